"""jobs.search on the command line, and what goes on from it: jobs.evaluate, jobs.train, jobs.plan; and what each refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from dataset_by_hand import draw_rows, write_dataset
from job_calls import Call, assert_one_line

from models.automtl.architecture import Architecture
from pipeline.run import checkpoint
from pipeline.storage.files import read_lines

pytestmark = pytest.mark.integration

SMALL = (
    "train.batch_size=32", "train.lanes=4", "train.max_steps=6", "train.threads=1", "space.width=8", "space.token_dim=4",
    "space.experts=3", "space.depth=2", "space.chosen=2", "space.interaction=[cross_2,attention_2,skip]",
    "space.blocks=[mlp_8,conv_3,skip]", "model.tower=[8]",
)  # fmt: skip
TRAIN = ("train.batch_size=32", "train.lanes=4", "train.threads=1", "model.tower=[8]", "model=automtl")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "data"
    write_dataset(folder, draw_rows(500))
    return folder


@pytest.fixture
def found(call: Call, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of jobs.search, made once."""
    run = dataset.parent / "search"
    if not (run / "architecture.yaml").exists():
        said = call("search", f"dataset={dataset}", f"run={run}", *SMALL)
        assert f"python -m jobs.train dataset={dataset} model=automtl model.architecture={run} run=RUN" in said, said
    return run


def test_a_search_is_a_run_with_a_supernets_checkpoint_and_an_architecture(found: Path) -> None:
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["model"]["fusion"]["name"] == "automtl_supernet"
    assert config["train"]["dense"] | {"name": "sgd", "lr": 0.02, "decay": "cosine"} == config["train"]["dense"]
    architecture = Architecture.model_validate(yaml.safe_load((found / "architecture.yaml").read_text()))
    [*_, line] = read_lines(found / "metrics" / "search.jsonl")
    assert architecture.same(Architecture.model_validate(line["architecture"]))
    assert json.loads((found / "status.json").read_text())["state"] == "finished"


def test_a_supernet_is_evaluated_as_any_run(call: Call, found: Path) -> None:
    said = call("evaluate", f"run={found}", "split=valid", "threads=1")
    assert not said.startswith("error"), said
    [*_, line] = read_lines(found / "metrics" / "eval.jsonl")
    assert line["step"] == 6
    assert all(math.isfinite(metrics["NE"]) for metrics in line["metrics"].values() if "NE" in metrics)


@pytest.mark.parametrize("by", ["run", "file"])
def test_what_was_found_trains_resumes_and_is_evaluated(
    call: Call, dataset: Path, found: Path, tmp_path: Path, by: str
) -> None:
    where = found if by == "run" else shutil.copy(found / "architecture.yaml", tmp_path / "mine.yaml")
    run = tmp_path / "train"
    arguments = (f"dataset={dataset}", f"run={run}", *TRAIN, f"model.architecture={where}")
    for steps in (3, 5):
        said = call("train", *arguments, f"train.max_steps={steps}")
        assert not said.startswith("error"), said
    assert checkpoint.steps(run / "checkpoints") == [3, 5]
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert config["architecture"] is None
    wanted = Architecture.model_validate(yaml.safe_load((found / "architecture.yaml").read_text()))
    assert wanted.same(Architecture.model_validate(config["fusion"]["architecture"]))
    # From then on the run knows its architecture itself.
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    if by == "file":
        Path(where).unlink()
    assert not call("evaluate", f"run={moved}", "split=valid", "threads=1").startswith("error")


def changed(architecture: dict[str, Any]) -> dict[str, Any]:
    other = "skip" if architecture["interaction"] != "skip" else "cross_2"
    return architecture | {"interaction": other}


def test_another_architecture_is_refused_in_mid_run(call: Call, dataset: Path, found: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    content = yaml.safe_load((found / "architecture.yaml").read_text())
    file.write_text(yaml.safe_dump(content))
    arguments = (f"dataset={dataset}", f"run={tmp_path / 'run'}", *TRAIN, f"model.architecture={file}")
    call("train", *arguments, "train.max_steps=2")
    file.write_text(yaml.safe_dump(content | {"strengths": {}}))  # for the reader alone
    assert not call("train", *arguments, "train.max_steps=3").startswith("error")
    file.write_text(yaml.safe_dump(changed(content)))
    assert_one_line(call("train", *arguments, "train.max_steps=4"), "model and optimisers", "another run=")
    file.unlink()
    assert not call("train", *arguments, "train.max_steps=4").startswith("error")  # the run knows it by itself
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 3, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist. jobs.search writes it"),
        ("[1, 2]", "mine.yaml"),
        ("experts: [", "mine.yaml"),
        ("width: 8", "mine.yaml: token_dim"),
        ("{width: 8, token_dim: 4, interaction: cross_2, experts: [[mlp_0]], tasks: {click: [1]}}", "mlp_0"),
        (
            "{width: 8, token_dim: 4, interaction: cross_2, experts: [[skip]], tasks: {other: [1]}}",
            "has no experts for",
        ),
    ],
)
def test_a_file_that_is_no_architecture_of_this_dataset_is_refused_in_one_line(
    call: Call, dataset: Path, tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    said = call("train", f"dataset={dataset}", f"run={tmp_path / 'run'}", *TRAIN, f"model.architecture={file}")
    assert_one_line(said, words)
    assert not (tmp_path / "run").exists()


def test_an_architecture_goes_with_model_automtl_alone_and_that_needs_one(
    call: Call, dataset: Path, tmp_path: Path
) -> None:
    known = (f"dataset={dataset}", f"run={tmp_path / 'run'}", "train.batch_size=32", "train.lanes=4")
    said = call("train", *known, "model=mmoe", "+model.architecture=x.yaml")
    assert_one_line(said, "model.architecture: fusion mmoe has none: set model=automtl")
    assert_one_line(call("train", *known, "model=automtl"), "model.architecture is missing")
    (tmp_path / "empty").mkdir()
    said = call("train", *known, "model=automtl", f"model.architecture={tmp_path / 'empty'}")
    assert_one_line(said, "empty/architecture.yaml does not exist")


def test_a_plan_reads_the_architecture_too(call: Call, dataset: Path, found: Path) -> None:
    arguments = (f"dataset={dataset}", "model=automtl", "ranks=2", "ranks_per_node=2", "device=cpu", "ddr=8GB")
    assert not call("plan", *arguments, f"model.architecture={found}").startswith("error")
    assert_one_line(call("plan", *arguments), "model.architecture is missing")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("model=mmoe", "model: jobs.search finds architectures of model=automtl"),
        ("train.weighting.name=uncertainty", "train.weighting.name=uncertainty has a state of its own"),
        ("train.dense_parallel=fsdp", "train.dense_parallel=fsdp does not go with a step on two batches"),
        ("train.pipelined=true", "train.pipelined=true does not go with a step on two batches"),
        ("train.accumulate=2", "train.accumulate does not go with a step on two batches"),
        ("train.compile=default", "train.compile=default does not go with a step on two batches"),
        ("space.chosen=4", "chosen: 4 of 3 experts"),
        ("space.blocks=[mlp_8,mlp_8]", "a candidate is there twice"),
        ("space.blocks=[conv_4]", "conv_4"),
        ("space.interaction=[mlp]", "mlp"),
        ("space.interaction=[attention_3]", "attention_3: token_dim 4 is not a multiple of 3"),
        ("search.order=3", "search.order"),
        ("search.warmup=1.5", "search.warmup"),
        ("search.patience=0", "search.patience"),
        ("search.budget={flops: 1}", "search.budget: 1 FLOPs a row"),
        ("search.budget={flops: 1, model: nothing}", "search.budget.model: nothing is not one of adatt, "),
        ("search.budget={flops: 0.5, model: automtl}", "model.architecture is missing"),
        ("search.budget={flops: 0.5, model: emm}", "search.budget.model"),
        ("model.interaction.name=dot", "use concat"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    call: Call, dataset: Path, tmp_path: Path, argument: str, words: str
) -> None:
    said = call("search", f"dataset={dataset}", f"run={tmp_path / 'run'}", *SMALL, argument)
    assert_one_line(said, words)
    assert not (tmp_path / "run").exists()


def test_a_dataset_without_validation_rows_is_refused_in_one_line(call: Call, tmp_path: Path) -> None:
    rows = draw_rows(500)
    write_dataset(tmp_path / "data", rows.filter([split != 1 for split in rows["split"].to_pylist()]))
    said = call("search", f"dataset={tmp_path / 'data'}", f"run={tmp_path / 'run'}", *SMALL)
    assert_one_line(said, "valid")


def test_random_search_says_what_it_has_written(call: Call, dataset: Path, tmp_path: Path) -> None:
    said = call("search", f"dataset={dataset}", f"run={tmp_path / 'run'}", *SMALL, "search.method=random")
    assert f"{tmp_path / 'run'}/architecture.yaml" in said
    assert "search.html" not in said
    assert not call(
        "train", f"dataset={dataset}", f"run={tmp_path / 'train'}", *TRAIN, f"model.architecture={tmp_path / 'run'}",
        "train.max_steps=1",
    ).startswith("error")  # fmt: skip
