"""Files of a --config-dir that have the name of one of ours: Hydra reads ours first, so they are refused."""

import shutil
from pathlib import Path

import pytest
from job_calls import Call, assert_one_line

from jobs import command_line

TRAIN = ("dataset=nowhere", "run=nowhere")
SAYS = "has the name of a config of taskfuse, which would be read in its place: give it another name"


@pytest.mark.parametrize(
    "name",
    ["data/demo.yaml", "data/census.yaml", "model/mmoe.yaml", "recipe/demo.yaml", "interaction/dot.yaml", "data/demo.yml",
    ]
)  # fmt: skip
def test_a_file_with_the_name_of_one_of_ours_is_refused_chosen_or_not(name: str, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "conf" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    for words in (["preprocess", "data=demo", "out=out"], ["train", *TRAIN]):
        assert_one_line(call(*words, f"--config-dir={tmp_path / 'conf'}"), f"{path} {SAYS}")


def test_links_to_ours_and_other_names_are_read(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "conf" / "data"
    data.mkdir(parents=True)
    (data / "demo.yaml").symlink_to(command_line.CONF / "data" / "demo.yaml")
    (data / "more").mkdir()
    shutil.copy(command_line.CONF / "data" / "demo.yaml", data / "more" / "demo.yaml")
    shutil.copy(command_line.CONF / "data" / "demo.yaml", data / "mmoe.yaml")  # the name of a model
    for name in ("demo", "more/demo", "mmoe"):
        said = call("preprocess", f"--config-dir={data.parent}", f"data={name}", "out=out", "input=/nowhere")
        assert_one_line(said, "/nowhere/impressions-{date}.csv: no such file")


def test_a_draft_of_such_a_name_is_refused_before_a_file_is_opened(call: Call, tmp_path: Path) -> None:
    for name in ("demo", "census"):
        out = tmp_path / "my" / "data" / f"{name}.yaml"
        assert_one_line(call("draft", "input=nowhere", f"out={out}", "overwrite=true"), f"{out} {SAYS}")
    assert_one_line(call("draft", "input=nowhere", f"out={tmp_path / 'my' / 'data' / 'mmoe.yaml'}"), "nowhere")
    assert not (tmp_path / "my").exists()
