"""Nights whose candidate and serving model have other schemas but the same encoders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from nightly_world import CONTENT, day, encode_day, night, no_beam, train_run, write_day

from features.errors import UserError
from pipeline.dataset.dataset import open_dataset
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.release import pages
from pipeline.release.nightly import nightly
from pipeline.release.scoring import reference, score
from pipeline.run.run import Run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of days 0 and 1, whose users are others, their datasets, and a run on day 0."""
    root = tmp_path_factory.mktemp("world")
    write_day(root / "log", 0, rows=600)
    write_day(root / "log", 1, rows=600, unseen=True)
    for number in range(2):
        encode_day(root / "log", root / "days", number)
    train_run(root / "days", root / "run", last=0, steps=10)
    whole = {"metric": "ne", "change": {"worse_by_at_most": 9}, "allow_ne_above_one": True}
    unseen = whole | {"slices": ["user: unseen"]}
    (root / "gates.yaml").write_text(
        json.dumps({"tasks": {"click": [whole, unseen], "save": [whole], "dwell": [{"metric": "rows", "min": 1}]}})
    )
    return root


def other_run(world: Path, folder: Path, task: str, **change: Any) -> Run:
    """A run on day 0 with another definition of a task."""
    content = CONTENT | {"tasks": CONTENT["tasks"] | {task: CONTENT["tasks"][task] | change}}
    encode_day(world / "log", folder / "days", 0, content)
    return train_run(folder / "days", folder / "other", last=0, steps=10)


@pytest.mark.parametrize("with_days", [False, True])
def test_models_whose_schemas_differ_in_a_loss_weight_are_compared_on_all_slices(world, tmp_path, with_days):
    other = other_run(world, tmp_path, "dwell", loss_weight=2.0)
    write_day(tmp_path / "alone", 1, rows=600, unseen=True)
    given: dict[str, Any] = {"days": tmp_path / "days"} if with_days else {}
    config = night(
        tmp_path / "alone", tmp_path / "nights", 1, run=other.path, serving=world / "run", gates=world / "gates.yaml",
        data_gates={"action": "warn"}, buckets=20, by_time=[], **given,
    )  # fmt: skip
    with no_beam():
        found = nightly(config).night
    gates = {(gate["slice"], gate["judged"]): gate["outcome"] for gate in found.summary("gates")["gates"]}
    assert found.outcome == "pass"
    assert gates["user: unseen", "change"] == "pass"
    encoded = open_dataset(world / "days" / day(1))
    wanted = score(reference(Run(world / "run"), None), encoded, 100, MeasureConfig(buckets=20))[0]
    assert found.scored("serving").figures["click"].value == pytest.approx(wanted.value("click", "ne"), rel=1e-6)


def test_models_are_compared_again_after_the_day_of_one_of_them_has_changed(world, tmp_path):
    other = other_run(world, tmp_path, "dwell", loss_weight=2.0)
    write_day(tmp_path / "log", 1, rows=600)
    config = night(
        tmp_path / "log", tmp_path / "nights", 1, run=other.path, serving=world / "run", gates=world / "gates.yaml",
        days=tmp_path / "days", data_gates={"action": "warn"}, buckets=20, by_time=[],
    )  # fmt: skip
    with no_beam(), pytest.MonkeyPatch.context() as broken:
        broken.setattr(pages, "write_night", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            nightly(config)
    write_day(tmp_path / "log", 1, rows=600, click_rate=1.0)
    [of_serving] = config.folder.glob("day-*")
    shutil.rmtree(of_serving)
    with no_beam():
        found = nightly(config).night
    theirs = {line["task"]: line["theirs"] for line in found.summary("compare")["changes"]}
    assert theirs["click"] == found.scored("serving").figures["click"].value


@pytest.mark.parametrize(("key", "value"), [("observed_when", "click = 1"), ("given", "click"), ("label", "1 - save")])
def test_models_whose_labels_differ_are_refused_before_any_work(world, tmp_path, key, value):
    other = other_run(world, tmp_path, "save", **{key: value})
    with pytest.raises(UserError, match=rf"tasks\.save\.{key} of .*/run is .*: only models of the same labels"):
        nightly(night(world / "log", tmp_path / "nights", 1, run=world / "run", serving=other.path))
    assert not [*(tmp_path / "nights").glob("*/day-*")]
