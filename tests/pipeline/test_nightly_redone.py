"""Nights that broke off: what is done again after the data, the settings or other nights have changed, or a result was lost."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nightly_world import day, encode_day, night, no_beam, train_run, write_day

from features.errors import UserError
from pipeline.release import nightly as job
from pipeline.release.data_checks import Checked
from pipeline.release.night import Night, Recorder, Step
from pipeline.release.nightly import nightly
from pipeline.release.scoring import reference
from pipeline.run.run import Run
from pipeline.storage.files import make_folder, write_json

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("without_beam")]


@pytest.fixture
def without_beam() -> Iterator[None]:
    with no_beam():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of days 0 and 1, a folder of days with day 0, a run on it, and gates that pass."""
    root = tmp_path_factory.mktemp("made")
    write_day(root / "log", 0, rows=600)
    write_day(root / "today", 1, rows=600)
    encode_day(root / "log", root / "days", 0)
    train_run(root / "days", root / "run", last=0, steps=10)
    lax = {"metric": "ne", "max": 5, "allow_ne_above_one": True}
    (root / "gates.yaml").write_text(json.dumps({"default": [lax, {"metric": "rows", "min": 1}]}))
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of it; the encoders are those of the copied day 0."""
    root = tmp_path / "world"
    shutil.copytree(made, root)
    config = root / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(root)))
    return root


def judge(world: Path, **settings: Any) -> Night:
    """Judges day 1."""
    given = {"run": world / "run", "gates": world / "gates.yaml", "by_time": [], "cold_start": False, "buckets": 20}
    return nightly(night(world / "today", world / "nights", 1, **(given | settings))).night


def break_off(world: Path, where: Any, name: str, **settings: Any) -> None:
    """A night that ends at a function."""
    broken = pytest.MonkeyPatch()
    broken.setattr(where, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judge(world, **settings)
    broken.undo()


def test_the_day_is_encoded_again_where_it_was_lost(world):
    break_off(world, job, "judge")
    [encoded] = (world / "nights" / day(1)).glob("day-*")
    shutil.rmtree(encoded)
    assert judge(world).outcome == "pass"
    assert (encoded / "manifest.json").exists()


def test_a_day_of_other_encoders_than_the_first_of_its_folder_is_refused(world):
    encode_day(world / "today", world / "others", 1)  # the first one there: it has encoders of its own
    shutil.copytree(world / "others" / day(1), world / "days" / day(1))
    with pytest.raises(UserError, match=rf"{day(1)} was encoded with .* with date={day(1)} overwrite=true"):
        judge(world, days=world / "days")


def test_the_data_is_checked_again_against_nights_that_came_meanwhile(world):
    break_off(world, job, "judge")
    checked = Checked(rows=5000, violations=[]).model_dump()
    step = Step(name="check", state="done", started=0.0, inputs="", summary=checked)
    other = Night(date=day(0), settings={}, steps=[step])
    write_json(make_folder(world / "nights" / day(0)) / "night.json", other.model_dump())
    found = judge(world)
    assert found.outcome == "undecided"
    assert "rows: 600, the median of the last 1 nights is 5,000" in found.why


def test_the_data_is_checked_again_after_the_dataset_of_the_encoders_was_made_again(world):
    break_off(world, job, "judge")
    write_day(world / "log", 0, rows=600, click_rate=-3.0)  # with the same features
    encode_day(world / "log", world / "days", 0, overwrite=True)
    found = judge(world)
    assert found.outcome == "undecided"
    assert "data: click: base rate" in found.why


def test_the_page_is_written_again_where_the_checks_or_the_best_checkpoint_are_others(world):
    run, page = Run(world / "run"), world / "nights" / day(1) / "report.html"
    metrics = {"click": {"ne": 0.5}, "save": {"ne": 0.9}, "dwell": {"nrmse": 0.5}}
    line = {"step": 5, "checkpoint": reference(run, 5).checkpoint, "split": "valid", "metrics": metrics}
    run.eval_metrics.write_text(json.dumps(line | {"dataset": str(world / "days" / day(0))}) + "\n")
    break_off(world, Recorder, "judged", data_gates={"base_rate": [1, 1], "action": "warn"})
    assert "allowed: 1 to 1 times" in page.read_text()
    break_off(world, Recorder, "judged")
    assert "allowed: 1 to 1 times" not in page.read_text()
    assert "evaluate best" not in page.read_text()
    assert judge(world, best="valid").outcome == "pass"
    assert "evaluate best" in page.read_text()
