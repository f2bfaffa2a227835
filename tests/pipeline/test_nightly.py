"""The nightly job as a whole: planted regressions, nights that are taken up or refused, late days, the pointer."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from nightly_world import day, encode_day, night, no_beam, record, spoiled, train_run, write_day
from pydantic import ValidationError
from sklearn.metrics import log_loss

from features.errors import UserError
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.scorer import Scorer
from pipeline.release import nightly as job
from pipeline.release import pages, steps
from pipeline.release.config import NightlyConfig
from pipeline.release.nightly import Result, go_back, nightly
from pipeline.release.outcome import pager_text
from pipeline.release.scoring import reference, score
from pipeline.release.tables import text
from pipeline.run.run import Run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("without_beam")]

QUICK = {"by_time": [], "cold_start": False, "buckets": 20}  # fewer slices and buckets
SOME_ROWS = {"metric": "rows", "min": 1}  # every task needs a gate
GATES = {
    "default": [{"metric": "ne", "change": {"worse_by_at_most": 0.01}}, {"metric": "ne", "max": 1.1}, SOME_ROWS],
    "tasks": {task: [{"metric": "calibration", "band": [0.75, 1.33]}] for task in ("click", "save")},
}


@pytest.fixture
def without_beam() -> Iterator[None]:
    with no_beam():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of days 0 to 4, their datasets, and a run on days 0 and 1."""
    root = tmp_path_factory.mktemp("world")
    for number in range(5):
        write_day(root / "log", number)
        encode_day(root / "log", root / "days", number)
    train_run(root / "days", root / "run", last=1, steps=120)
    (root / "gates.yaml").write_text(yaml.safe_dump(GATES))
    return root


@pytest.fixture
def out(world: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of nights; what they pinned in the shared run is taken away after."""
    yield tmp_path / "nights"
    shutil.rmtree(world / "run" / "pins", ignore_errors=True)


def judged(world: Path, out: Path, number: int, run: Path | None = None, **settings: Any) -> Result:
    """Judges a day that is encoded already."""
    settings = {"run": run or world / "run", "days": world / "days", "gates": world / "gates.yaml", **QUICK, **settings}
    return nightly(night(world / "log", out, number, **settings))


def changed(task: int, key: str, change: Any) -> Any:
    """A change of one task's last layer: `key` is weight or bias."""

    def change_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith(f"towers.out.{key}"):
            return tensor
        tensor = tensor.clone()
        tensor[task] = change(tensor[task])
        return tensor

    return change_tensor


def states(out: Path, number: int) -> dict[str, str]:
    return {step["name"]: step["state"] for step in record(out, number)["steps"]}


def test_an_equal_model_passes_with_every_step_recorded_and_moves_the_pointer(world, out):
    first = judged(world, out, 3, bless="pass")
    assert (first.night.outcome, first.night.exit_code, first.message["serving"]) == ("pass", 0, None)
    assert [*states(out, 3)] == ["models", "preprocess", "check", "evaluate candidate", "gates", "report", "bless"]
    second = judged(world, out, 4, bless="pass", tables="needed")  # the rows of the day's ids are enough
    assert (second.night.outcome, second.message["blessed"]) == ("pass", "serves already")
    assert {*states(out, 4)} == {*states(out, 3), "evaluate serving", "compare"}
    assert {*states(out, 4).values()} == {"done"}
    assert second.message["serving"] == first.message["candidate"] == second.message["candidate"]
    changes = second.night.summary("compare")["changes"]
    assert [(line["task"], line["metric"], line["delta"], line["se"]) for line in changes] == [
        ("click", "ne", 0, 0), ("save", "ne", 0, 0), ("dwell", "nrmse", 0, 0)
    ]  # fmt: skip
    page = (out / day(4) / "report.html").read_text()
    assert "worse by at most 0.01" in page
    assert day(4) in (out / "trend.html").read_text()
    pointer = json.loads((out / "serving.json").read_text())
    assert (pointer["night"], pointer["step"], pointer["verdict"]) == (day(3), 120, "pass")
    assert json.loads(json.dumps(second.message)) == second.message


@pytest.mark.parametrize(
    ("task", "key", "change", "fails"),
    [
        (0, "bias", lambda x: x + 1.0, {("click", "ne"), ("click", "calibration")}),
        (1, "weight", lambda x: -3 * x, {("save", "ne")}),
        (2, "weight", lambda x: 0 * x, set()),
    ],
)
def test_a_planted_regression_fails_the_gates_of_its_task_and_no_other(world, out, tmp_path, task, key, change, fails):
    bad = spoiled(Run(world / "run"), tmp_path / "bad", changed(task, key, change))
    gates = GATES | {"default": [*GATES["default"], {"metric": "nrmse", "max": 0.9}]}
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump(gates))
    found = judged(world, out, 3, run=bad.path, serving=world / "run", gates=tmp_path / "gates.yaml", bless="pass")
    failed = {
        (gate["task"], gate["metric"]) for gate in found.night.summary("gates")["gates"] if gate["outcome"] == "fail"
    }
    if task == 2:
        fails = {("dwell", "nrmse")}
    assert failed >= fails
    assert {name for name, _ in failed} == {name for name, _ in fails}
    if task == 0:  # a shifted bias leaves the order of the rows alone
        values = evaluated.read(out / day(3) / "candidate.parquet")
        before = evaluated.read(out / day(3) / "serving.parquet")
        assert values.value("click", "auc") == pytest.approx(before.value("click", "auc"), abs=1e-9)
    assert (found.night.outcome, found.night.exit_code) == ("fail", 2)
    assert found.message["not_passed"][0].startswith("fail: ")
    assert not (out / "serving.json").exists()
    assert "bless" not in states(out, 3)


def test_a_planted_regression_of_one_slice_fails_its_gate_alone(world, out, tmp_path):
    """The embedding of one item is another; all rows together hide it."""
    item = Dataset(world / "days" / day(0)).encoders.vocabularies["item"].to_pylist().index("i3")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "item" not in name:
            return tensor
        tensor = tensor.clone()
        offset = len(tensor) - 20  # ids of missing and unseen values come first
        tensor[offset + item] = -4 * tensor[offset + item]
        return tensor

    bad = spoiled(Run(world / "run"), tmp_path / "bad", change)
    of_items = {"metric": "ne", "slices": "item=*", "change": {"worse_by_at_most": 0.05}, "allow_ne_above_one": True}
    whole = {"metric": "ne", "change": {"worse_by_at_most": 0.5}, "allow_ne_above_one": True}
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"tasks": {"click": [of_items, whole], "dwell": [SOME_ROWS]}}))
    settings = {"serving": world / "run", "gates": tmp_path / "gates.yaml", "slices": ["item"], "min_rows": 30}
    found = judged(world, out, 3, run=bad.path, **settings)
    outcomes = {
        gate["slice"]: gate["outcome"] for gate in found.night.summary("gates")["gates"] if gate["task"] == "click"
    }
    assert len(outcomes) == 21
    assert {name for name, outcome in outcomes.items() if outcome == "fail"} == {"item=i3"}
    assert outcomes["all"] == "pass"


def test_too_few_rows_are_undecided_and_exit_with_3(world, out, tmp_path):
    near = spoiled(Run(world / "run"), tmp_path / "near", changed(0, "bias", lambda x: x + 0.35))
    gates = {"default": [{"metric": "ne", "change": {"worse_by_at_most": 0.012}, "confidence": 0.9999}, SOME_ROWS]}
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump(gates))
    found = judged(world, out, 3, run=near.path, serving=world / "run", gates=tmp_path / "gates.yaml", bless="pass")
    assert (found.night.outcome, found.night.exit_code, found.message["blessed"]) == ("undecided", 3, None)


def test_figures_are_those_of_all_rows_and_of_all_rows_but_a_bucket(world):
    run, dataset = Run(world / "run"), open_dataset(world / "days" / day(3))
    found, of_record = score(reference(run, None), dataset, 200, MeasureConfig(buckets=20))
    assert of_record["metrics"]["click"]["ne"] == found.value("click", "ne")
    assert of_record["group"] == of_record["cluster"]
    frames = []
    for split in ("train", "valid", "test"):
        scorer = Scorer(run, dataset, split, 10_000)
        scorer.metrics(120, lambda batch, logit_BT: frames.append((batch, logit_BT.sigmoid()[:, 0])))
    label = torch.cat([batch.label_BT[batch.row_id_B >= 0, 0] for batch, _ in frames]).double()
    p = torch.cat([p_B[batch.row_id_B >= 0] for batch, p_B in frames]).double()
    assert len(label) == 1500
    rate = label.mean()
    entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    assert found.value("click", "ne") == pytest.approx(log_loss(label, p) / float(entropy), rel=1e-6)
    assert found.figures.filter(task="click", metric="ne", slice="all")["left_out"].list.len().to_list() == [20]
    assert found.provenance.dataset.startswith("1,500 rows ")
    lines = found.figures.filter(metric="ne", slice="all")
    assert (lines["se"] > 0).all()


def test_models_of_other_encoders_are_paired_on_the_rows_that_they_share(world, out, tmp_path):
    write_day(tmp_path / "log", 0, rows=700)
    encode_day(tmp_path / "log", tmp_path / "days", 0)
    other = train_run(tmp_path / "days", tmp_path / "other", last=0, steps=20)
    rare = {"metric": "ne", "slice": "user: rare", "change": {"worse_by_at_most": 1}, "missing": "pass"}
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"default": [rare, SOME_ROWS]}))
    settings = {"gates": tmp_path / "gates.yaml", "cold_start": True, "rare": 30}
    found = judged(world, out, 3, serving=other.path, **settings)
    assert (
        len([*(out / day(3)).glob(f"day-*/{day(3)}/manifest.json")]) == 1
    )  # with the encoders of `other`; the other one is in days
    folders = found.night.summary("preprocess")["folders"]
    assert folders["candidate"] == str(world / "days" / day(3))
    changes = {line["task"]: line for line in found.night.summary("compare")["changes"]}
    assert changes["click"]["delta"] < 0 < changes["click"]["se"]
    assert changes["click"]["buckets"] == 20
    # Which users are rare depends on the encoders: those slices are other rows.
    assert [*evaluated.read(out / day(3) / "serving.parquet").figures.filter(slice="user: rare", task="click")["rows"]]
    (verdict,) = (
        x for x in found.night.summary("gates")["gates"] if (x["task"], x["slice"]) == ("click", "user: rare")
    )
    assert verdict["rows"] > 0
    assert (verdict["serving"], verdict["why"]) == (None, "undefined for the serving checkpoint")


def test_a_date_is_judged_once_and_anew_only_when_told(world, out, monkeypatch):
    first = judged(world, out, 3)
    before = record(out, 3)
    calls: list[str] = []
    monkeypatch.setattr(steps, "evaluate", lambda *a, f=steps.evaluate: calls.append(a[1]) or f(*a))
    again = judged(world, out, 3)
    assert record(out, 3) == before
    assert again.message == first.message
    with pytest.raises(UserError, match=rf"{day(3)} was judged with other settings \(batch_size, share\)\. Set again="):
        judged(world, out, 3, batch_size=100, share=0.5)
    assert calls == []
    assert judged(world, out, 3, batch_size=100, again=True).night.outcome == "pass"
    assert calls == ["candidate"]
    assert record(out, 3)["settings"]["batch_size"] == 100


def test_a_blessed_date_that_fails_when_judged_again_names_what_still_serves(world, out, tmp_path):
    strict = {"metric": "ne", "max": 0.01, "allow_ne_above_one": True}
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump({"default": [strict, SOME_ROWS]}))
    lax = {"gates": None, "max_increase": 5.0, "bless": "pass"}
    judged(world, out, 2, step=60, **lax)
    assert judged(world, out, 3, **lax).message["blessed"].startswith("serves from now on")
    failed = {"gates": tmp_path / "strict.yaml", "again": True}
    found = judged(world, out, 3, **failed)
    words = f"{world / 'run'} step 120, which this night blessed before it was judged again, still serves: "
    assert (found.night.outcome, found.message["blessed"]) == (
        "fail", f"{words}bless=back withdraw={day(3)} takes it back"
    )  # fmt: skip
    assert words in text(found)
    assert words in pager_text(found.message)
    assert judged(world, out, 4, **failed).message["blessed"] is None  # it has blessed nothing
    go_back(NightlyConfig(out=out, date=day(4), bless="back", withdraw=day(3)))
    assert judged(world, out, 3, **failed | {"again": False}).message["blessed"] is None


def test_a_folder_of_nights_that_was_moved_keeps_its_verdicts(world, out, tmp_path):
    first = judged(world, out, 3)
    out.rename(tmp_path / "moved")
    assert judged(world, tmp_path / "moved", 3).night == first.night


def test_a_night_that_was_judged_is_blessed_later_without_being_judged_again(world, out):
    judged(world, out, 3)
    before = record(out, 3)
    found = judged(world, out, 3, bless="pass")
    assert found.message["blessed"].startswith("serves from now on")
    assert record(out, 3)["steps"][:-1] == before["steps"]
    assert record(out, 3)["judged"] == before["judged"]


def test_a_night_that_failed_on_the_way_goes_on_and_redoes_what_has_changed(world, out, monkeypatch, caplog):
    broken = pytest.MonkeyPatch()
    broken.setattr(job, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judged(world, out, 3)
    broken.undo()
    assert states(out, 3)["gates"] == "failed"
    assert record(out, 3)["outcome"] is None
    scored: list[str] = []
    monkeypatch.setattr(steps, "evaluate", lambda *a, f=steps.evaluate: scored.append(a[1]) or f(*a))
    assert judged(world, out, 3, batch_size=77).night.outcome == "pass"
    assert scored == ["candidate"]
    assert f"{day(3)}: evaluate candidate is done again: its inputs have changed since" in caplog.text
    assert "check is done again" not in caplog.text


def test_gates_that_were_changed_after_a_kill_are_judged_anew(world, out, tmp_path):
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(pages, "write_night", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            judged(world, out, 3)
    assert (states(out, 3)["gates"], record(out, 3)["outcome"]) == ("done", None)
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"default": [{"metric": "rows", "min": 10**6}]}))
    assert judged(world, out, 3, gates=tmp_path / "gates.yaml").night.outcome == "fail"


@pytest.mark.parametrize("stopped_by_data", [False, True])
def test_what_an_abandoned_attempt_scored_is_not_of_the_night(world, out, tmp_path, stopped_by_data):
    abandoned = shutil.copytree(world / "run", tmp_path / "abandoned")
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"default": [{"metric": "ne", "max": 0.01}, SOME_ROWS]}))
    broken = pytest.MonkeyPatch()
    broken.setattr(pages, "write_night", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judged(world, out, 3, serving=abandoned, gates=tmp_path / "gates.yaml")
    broken.undo()
    assert states(out, 3)["evaluate serving"] == states(out, 3)["gates"] == "done"
    found = judged(world, out, 3, **({"data_gates": {"base_rate": [1, 1]}} if stopped_by_data else {}))
    assert (found.night.outcome, found.message["not_passed"]) == ("undecided" if stopped_by_data else "pass", [])
    assert found.message["serving"] is None
    assert found.trend.nights[0].serving is None
    assert (found.message["candidate"] is None) == stopped_by_data
    if not stopped_by_data:
        assert "abandoned" not in (out / day(3) / "report.html").read_text()


def test_a_late_day_is_judged_after_a_later_one_and_does_not_move_the_pointer(world, out):
    judged(world, out, 4, bless="pass")
    late = judged(world, out, 3, step=60, bless="pass", gates=None, max_increase=5.0)
    assert late.night.outcome == "pass"
    assert late.message["serving"]["step"] == 120
    assert late.message["blessed"] == f"not moved: the checkpoint that serves has passed on the later day {day(4)}"
    assert json.loads((out / "serving.json").read_text())["night"] == day(4)
    assert [point.date for point in late.trend.nights] == [day(3), day(4)]


def test_back_withdraws_a_checkpoint_and_the_next_night_does_not_bless_it_again(world, out):
    lax = {"gates": None, "max_increase": 5.0, "bless": "pass"}
    judged(world, out, 2, step=60, **lax)
    judged(world, out, 3, **lax)
    assert json.loads((out / "serving.json").read_text())["step"] == 120
    said = go_back(NightlyConfig(out=out, date=day(4), bless="back"))
    assert (said["serving"]["step"], said["withdrawn"]["step"], said["exit_code"]) == (60, 120, 0)
    # Neither the same night again nor the next one undoes it.
    assert json.loads((out / "serving.json").read_text())["step"] == 60
    for number in (3, 4):
        found = judged(world, out, number, **lax)
        assert found.message["blessed"] == "not moved: bless=back has withdrawn this checkpoint"
    assert (found.message["serving"]["step"], found.night.outcome) == (60, "pass")
    with pytest.raises(UserError, match="names no earlier checkpoint"):
        go_back(NightlyConfig(out=out, date=day(4), bless="back"))


def test_data_that_is_not_sound_ends_the_night_before_models_are_scored(world, out, tmp_path):
    write_day(tmp_path / "log", 3, click_rate=-3.0)
    shutil.copytree(world / "days", tmp_path / "days")
    shutil.rmtree(tmp_path / "days" / day(3))
    given = {"run": world / "run", "days": tmp_path / "days"}
    found = nightly(night(tmp_path / "log", out, 3, **given, bless="pass"))
    assert (found.night.outcome, found.night.exit_code) == ("undecided", 3)
    assert found.night.why.startswith("undecided: the day's data: click: base rate 0.0")
    assert "evaluate candidate" not in states(out, 3)
    warned = nightly(night(tmp_path / "log", out, 3, **given, again=True, data_gates={"action": "warn"}))
    assert warned.message["data"] == found.message["data"] != []
    assert states(out, 3)["evaluate candidate"] == "done"
    assert (tmp_path / "days" / day(3) / "manifest.json").exists()  # for the next nights to train on


def test_what_is_wrong_is_refused_before_any_work(world, out, tmp_path):
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"tasks": {"klick": [{"metric": "ne", "max": 1}]}}))
    gates = {"default": [{"metric": "ne", "max": 1, "slice": "hour=24"}]}
    (tmp_path / "hours.yaml").write_text(yaml.safe_dump(gates))
    for settings, words in (
        ({"gates": tmp_path / "gates.yaml"}, "klick: no such task"),
        (
            {"gates": tmp_path / "hours.yaml", "by_time": ["hour"]},
            "slice hour=24: the evaluation has .* .did you mean hour=",
        ),
        ({"step": 7}, r"no checkpoint of step 7, there are \[60, 120\]"),
        ({"serving": tmp_path}, "no checkpoint"),
        ({"webhook": True}, "TASKFUSE_WEBHOOK is not set"),
        ({"max_increase": 0.1}, "max_increase is for nights without a gates.yaml"),
        ({"best": "valid"}, "no checkpoint of .* is evaluated on it. Run jobs.evaluate"),
    ):
        with pytest.raises(UserError, match=words):
            judged(world, out, 3, **settings)
    other = shutil.copytree(world / "run", tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"tasks": ["click"]}))
    with pytest.raises(UserError, match="only models of the same tasks"):
        judged(world, out, 3, serving=other)
    (other / "gates.yaml").symlink_to(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"other/gates\.yaml is a link"):
        judged(world, out, 3, run=other, gates=None)
    assert not [*out.glob("*/*.parquet"), *out.glob("*/day-*")]
    for settings, words in (
        ({"run": None}, "give run=RUN"),
        ({"run": "r", "train": {}, "days": "d"}, "not both"),
        ({"run": "r", "input": None}, "input is missing"),
        ({"train": {}}, "train needs days="),
        ({"run": None, "train": {}, "days": "d", "step": 3}, "step is of run="),
        ({"run": None, "train": {}, "days": "d", "best": "valid"}, "best is of run="),
        ({"train": {"args": ["run=x"]}, "days": "d"}, "run is given by the night"),
        ({"run": "r", "serving_step": 3}, "serving_step is of serving="),
        ({"run": "r", "data_gates": {"rows": [2, 3]}}, "no factors"),
        ({"run": "r", "days": "d", "date": "monday"}, "days needs a date as YYYY-MM-DD"),
    ):
        with pytest.raises(ValidationError, match=words):
            NightlyConfig.model_validate({"input": "x", "out": out, "date": day(3)} | settings)


def test_two_nights_in_one_folder_are_not_at_work_at_once(world, out):
    with (
        job.alone(out),
        pytest.raises(UserError, match=r"nights: another jobs\.nightly is at work in it\. Wait for it"),
    ):
        judged(world, out, 3)
    assert not (out / day(3)).exists()


def test_the_best_checkpoint_is_scored_for_the_record(world, out, tmp_path):
    run = shutil.copytree(world / "run", tmp_path / "run")
    lines = []
    for step, ne in ((60, 0.5), (120, 0.9)):
        checksum = reference(Run(run), step).checkpoint
        metrics = {"click": {"ne": ne}, "save": {"ne": 0.9}, "dwell": {"nrmse": 0.5}}
        dataset = str(world / "days" / f"{day(0)}..{day(1)}")
        lines.append({"step": step, "checkpoint": checksum, "split": "valid", "dataset": dataset, "metrics": metrics})
    Run(run).eval_metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = judged(world, out, 3, run=run, best="valid")
    assert found.night.scored("best").model.step == 60
    assert found.night.scored("candidate").model.step == 120
    assert pl.read_parquet(out / day(3) / "best.parquet").height > 0


def test_a_page_that_cannot_be_drawn_does_not_stop_the_verdict(world, out, tmp_path, caplog):
    run = shutil.copytree(world / "run", tmp_path / "run")
    (run / "metrics" / "train.jsonl").write_text('{"rows": "many"}\n')
    assert judged(world, out, 3, run=run).night.outcome == "pass"
    assert "no page of the night" in caplog.text
    assert "train.jsonl" in record(out, 3)["steps"][-1]["summary"]["error"]


def test_a_page_of_all_nights_that_cannot_be_written_does_not_stop_the_verdict(world, out, caplog):
    (out / "trend.html").mkdir(parents=True)
    assert judged(world, out, 3, bless="pass").message["outcome"] == "pass"
    assert "no page of all nights" in caplog.text


def test_what_killed_writers_left_is_removed(world, out):
    (out / day(3)).mkdir(parents=True)
    left = [out / f".serving.json.{'a' * 32}", out / day(3) / f".night.json.{'0' * 32}"]
    for file in left:
        file.write_text("torn")
    judged(world, out, 3)
    assert not any(file.exists() for file in left)


def test_nights_on_a_store_judge_as_those_on_disk(world, out, memory):
    there = memory / "nights"
    shared = {"bless": "pass", "days": None}  # the day is encoded in the night's own folder
    wanted, found = judged(world, out, 3, **shared), judged(world, there, 3, **shared)
    assert (found.night.outcome, found.message["blessed"]) == (
        "pass",
        wanted.message["blessed"].replace(str(out), str(there)),
    )
    assert [step.state for step in found.night.steps] == ["done"] * len(wanted.night.steps)
    file = f"{day(3)}/candidate.parquet"
    assert evaluated.read(there / file).figures.equals(evaluated.read(out / file).figures)
    assert found.message["record"] == str(there / day(3) / "night.json")
    assert "<html" in (there / day(3) / "report.html").read_text()
    begun = json.loads((there / day(3) / "night.json").read_text())["steps"]
    second = judged(world, there, 4, **shared)  # compared with what serves
    assert second.message["serving"] == second.message["candidate"] == found.message["candidate"]
    judged(world, there, 3, **shared)
    assert json.loads((there / day(3) / "night.json").read_text())["steps"] == begun  # none was done again
    with pytest.raises(UserError, match="names no earlier checkpoint"):
        go_back(night(world / "log", there, 4, bless="back"))
