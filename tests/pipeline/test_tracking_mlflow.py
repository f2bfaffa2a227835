"""MLflow: a run directory is one run of it with every figure once, whatever is killed, resumed, rolled back or evaluated anew.

Tests run over the package where it is installed, with its database file, and over tests/fake_mlflow.py everywhere.
"""

import importlib.util
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_mlflow
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from features.errors import UserError
from features.plain_json import read_json
from features.yaml_text import yaml_of
from pipeline.run.run import Run
from pipeline.run.tracking import background, mlflow
from pipeline.run.tracking.base import TRAIN, EvalRecord, Job, Published, Record, RolledBack, TrainRecord
from pipeline.run.tracking.registry import opened
from pipeline.run.tracking.settings import TrackingSettings

ONLY = {"MLflow": mlflow.open_sink}
HERE = importlib.util.find_spec("mlflow") is not None
Points = Counter[tuple[str, int, float]]


def trained(step: int, ne: float = 0.9, **changes: Any) -> dict[str, Any]:
    record = {
        "step": step, "time": 1000.0 + step, "lr": 0.1, "loss": 1 / step, "rows_per_s": 5.0, "data_wait": 0.0,
        "weight": {"click": 1.0}, "ne": {"click": ne, "sale": None}, "task_loss": {},
    }  # fmt: skip
    return record | changes


def evaluated(step: int, ne: float = 0.9, split: str = "test") -> dict[str, Any]:
    metrics = {"click": {"ne": ne, "auc": 0.7, "gauc": None}}
    return {"step": step, "time": 1000.0 + step, "split": split, "checkpoint": "c", "metrics": metrics}


class Tracked:
    """A run directory and the MLflow that its jobs send to."""

    def __init__(self, folder: Path, client: Callable[[str], Any]) -> None:
        self.run = Run(folder / "mine" / "adatt")
        (self.run.path / "metrics").mkdir(parents=True)
        self.write_config(lr=0.1)
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.settings = TrackingSettings(tracking="mlflow", tracking_uri=self.uri)
        self.client = client(self.uri)

    def write_config(self, lr: float) -> None:
        content = {"dataset": "/data", "model": {"tower": [8]}, "train": {"dense": {"lr": lr}, "tasks": {}}}
        (self.run.path / "config.yaml").write_text(yaml_of(content))

    def job(self, *events: Any, series: str = TRAIN, history: list[Record] | None = None) -> None:
        """A job with these events, to its end."""
        split = series.removeprefix("eval_") if series != TRAIN else ""
        with opened(Job(self.run, series, split, history=history or []), self.settings, ONLY) as sinks:
            for event in events:
                sinks.handle(event)

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name("mine")
        tag = read_json(self.run.path, "mlflow.json")["id"]
        return self.client.search_runs([experiment.experiment_id], f"tags.`taskfuse.run` = '{tag}'")

    def points(self, key: str) -> list[tuple[int, float]]:
        [run] = self.runs()
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, key)]


@pytest.fixture(
    params=["fake", pytest.param("real", marks=pytest.mark.skipif(not HERE, reason="mlflow is not installed"))]
)
def tracked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracked]:
    if request.param == "fake":
        fake_mlflow.install(monkeypatch)
        yield Tracked(tmp_path, fake_mlflow.MlflowClient)
    else:
        shutil.copy(request.getfixturevalue("empty_database"), tmp_path / "mlflow.db")
        yield Tracked(tmp_path, mlflow.import_client().MlflowClient)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take a second."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.import_client().MlflowClient(f"sqlite:///{file}").get_experiment_by_name("none")
    return file


def test_the_figures_of_a_training_and_its_settings_are_one_run_named_like_the_folder(tracked: Tracked) -> None:
    tracked.job(*[TrainRecord(trained(step)) for step in (1, 2, 3)])
    [run] = tracked.runs()
    assert run.info.run_name == "adatt"
    assert run.info.status == "FINISHED"
    assert run.data.params["train.dense.lr"] == "0.1"
    assert run.data.params["model.tower"] == "[8]"
    assert tracked.points("train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert tracked.points("train_ne/click") == [(1, 0.9), (2, 0.9), (3, 0.9)]
    assert tracked.points("train_ne/sale") == []  # undefined


def test_a_killed_and_resumed_training_goes_on_in_the_same_run_with_every_step_once(tracked: Tracked) -> None:
    lines: list[Record] = [trained(step) for step in (1, 2, 3)]
    tracked.job(*map(TrainRecord, lines))
    # Resumed at step 2: step 3 is repeated a little differently, as on a GPU, step 4 was not sent before the kill.
    tracked.job(TrainRecord(trained(3, loss=0.3334)), TrainRecord(trained(5)), history=[*lines[:2], trained(4)])
    assert sorted(tracked.points("train/loss")) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25), (5, 0.2)]


def test_a_record_that_was_not_sent_before_an_evaluator_was_killed_is_sent_by_the_next(tracked: Tracked) -> None:
    tracked.job(EvalRecord(evaluated(2)), series="eval_test")
    known: list[Record] = [evaluated(2), evaluated(4, 0.8)]
    for _ in range(2):
        tracked.job(series="eval_test", history=known)
    tracked.job(EvalRecord(evaluated(2, 0.7, "valid")), series="eval_valid")
    assert tracked.points("eval_test/click/ne") == [(2, 0.9), (4, 0.8)]
    assert tracked.points("eval_valid/click/ne") == [(2, 0.7)]
    assert tracked.points("eval_test/click/gauc") == []


def test_a_run_that_only_an_evaluator_tracks_ends_as_its_training_did(tracked: Tracked) -> None:
    found = []
    for state in (None, "training", "preempted", "failed", "finished"):
        if state:
            tracked.run.write_status(state, 2, 4)
        tracked.job(EvalRecord(evaluated(2)), series="eval_test")
        found.append(tracked.runs()[0].info.status)
    assert found == ["RUNNING", "RUNNING", "KILLED", "FAILED", "FINISHED"]
    tracked.job(TrainRecord(trained(3)))
    ended = tracked.runs()[0].info.end_time
    tracked.job(EvalRecord(evaluated(4)), series="eval_test")
    assert tracked.runs()[0].info.end_time == ended


def test_a_checkpoint_trained_anew_has_its_new_value_as_the_newest(tracked: Tracked) -> None:
    again = evaluated(4, 0.6) | {"time": 2000.0}
    tracked.job(*map(EvalRecord, [evaluated(2), evaluated(4), again]), series="eval_test")
    [run] = tracked.runs()
    assert run.data.metrics["eval_test/click/ne"] == 0.6
    assert sorted(tracked.points("eval_test/click/ne")) == [(2, 0.9), (4, 0.6), (4, 0.9)]


def test_steps_repeated_after_a_rollback_are_one_point_and_a_tag_names_the_rollback(tracked: Tracked) -> None:
    tracked.job(
        TrainRecord(trained(1)),
        TrainRecord(trained(2)),
        RolledBack(1),
        TrainRecord(trained(2, loss=0.7)),
        TrainRecord(trained(3)),
    )
    assert [step for step, _ in tracked.points("train/loss")] == [1, 2, 3]
    [run] = tracked.runs()
    assert run.data.tags["taskfuse.rolled_back"].startswith("to step 1:")


def test_a_setting_that_was_changed_before_a_resume_is_a_tag(tracked: Tracked) -> None:
    tracked.job(TrainRecord(trained(1)))
    tracked.write_config(lr=0.05)
    tracked.job(TrainRecord(trained(2)))
    [run] = tracked.runs()
    assert run.data.params["train.dense.lr"] == "0.1"
    assert run.data.tags["changed.train.dense.lr"] == "0.05"
    assert [tag for tag in run.data.tags if tag.startswith("changed.")] == ["changed.train.dense.lr"]


def test_a_page_is_sent_and_one_that_is_missing_or_a_link_is_not(tracked: Tracked, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<html>")
    (tmp_path / "link.html").symlink_to(tmp_path / "report.html")
    tracked.job(*[Published(tmp_path / name) for name in ("report.html", "none.html", "link.html")])
    [run] = tracked.runs()
    assert [file.path for file in tracked.client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_more_figures_than_a_request_may_have_all_arrive(tracked: Tracked) -> None:
    tracked.job(history=[trained(step) for step in range(1, 700)])
    assert [step for step, _ in tracked.points("train/loss")] == list(range(1, 700))


def test_task_names_of_any_kind_are_sent(tracked: Tracked) -> None:
    tasks = ["a+b", "a*b", "..", ".", "", " ", "ü", "a/../b", "x" * 300, "x" * 301]
    tracked.job(TrainRecord(trained(1, ne=0.5) | {"ne": {task: n / 10 for n, task in enumerate(tasks)}}))
    for n, task in enumerate(tasks):
        assert tracked.points(mlflow.key_of("train_ne", *task.split("/"))) == [(1, n / 10)]


PARTS = st.lists(st.text("ab+._x2 /", max_size=4), min_size=1, max_size=3)


@given(PARTS, PARTS)
@example(["a+"], ["a_x2b_"])
@example(["a"], ["a", ""])
@example(["x" * 300 + "+"], ["x" * 300 + "*"])
def test_names_that_differ_stay_different(some: list[str], others: list[str]) -> None:
    assert (mlflow.key_of(*some) == mlflow.key_of(*others)) == (some == others)


@given(st.lists(st.text(max_size=300), min_size=1, max_size=3))
def test_every_name_is_one_that_mlflow_allows(parts: list[str]) -> None:
    fake_mlflow.check_name(mlflow.key_of(*parts))


def test_what_is_sent_while_mlflow_cannot_be_reached_arrives_once_it_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_mlflow.install(monkeypatch)
    tracked = Tracked(tmp_path, fake_mlflow.MlflowClient)
    log_batch, calls = fake_mlflow.MlflowClient.log_batch, [0]

    def refuse(*words: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] in (2, 3, 4):
            raise fake_mlflow.MlflowException("https://ann:secret@host/api cannot be reached")
        log_batch(*words, **named)

    monkeypatch.setattr(fake_mlflow.MlflowClient, "log_batch", refuse)
    with caplog.at_level(logging.WARNING):
        tracked.job(*[TrainRecord(trained(step)) for step in range(1, 7)])
    assert calls[0] > 4
    assert [step for step, _ in tracked.points("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "secret" not in caplog.text
    assert len([r for r in caplog.records if "cannot be reached" in r.getMessage()]) == 1  # a line, not one an event


def test_a_server_that_hangs_costs_a_job_a_limited_time_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_mlflow.install(monkeypatch)
    monkeypatch.setattr(background, "CLOSE_S", 0.2)
    tracked, ended = Tracked(tmp_path, fake_mlflow.MlflowClient), background.Queue[int]()
    monkeypatch.setattr(fake_mlflow.MlflowClient, "search_runs", lambda *_: ended.get())
    tracked.job(*[TrainRecord(trained(step)) for step in (1, 2)])
    assert "could not be sent in time" in caplog.text
    ended.put(0)


def test_two_runs_of_a_folder_are_two_runs_of_one_experiment(tracked: Tracked) -> None:
    tracked.job(TrainRecord(trained(1)))
    first = tracked.runs()[0].info
    shutil.rmtree(tracked.run.path)  # started anew at the same place
    (tracked.run.path / "metrics").mkdir(parents=True)
    tracked.write_config(lr=0.2)
    tracked.job(TrainRecord(trained(1)))
    second = tracked.runs()[0].info
    assert second.run_id != first.run_id
    assert second.experiment_id == first.experiment_id


@pytest.mark.parametrize("content", ["{", "{}", '{"id": "x\' OR 1"}', '{"id": 5}', "[]"])
def test_a_damaged_identity_is_one_line_and_sends_nothing(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_mlflow.install(monkeypatch)
    tracked = Tracked(tmp_path, fake_mlflow.MlflowClient)
    (tracked.run.path / "mlflow.json").write_text(content)
    tracked.job(TrainRecord(trained(1)))
    assert "mlflow.json" in caplog.text
    assert not fake_mlflow.STORES[tracked.uri].runs


def test_a_missing_package_is_one_line_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'taskfuse\[mlflow\]'"):
        mlflow.check(TrackingSettings(tracking="mlflow"))
    mlflow.check(TrackingSettings())


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("https://ann:secret@host", "MLFLOW_TRACKING_URI"),
        ("postgresql://host/db?password=secret", "MLFLOW_TRACKING_URI"),
        ("./mlruns", "sqlite:"),
        ("file:///runs/mlruns", "sqlite:"),
    ],
)
def test_an_address_with_a_password_or_of_a_file_store_is_refused_without_printing_it(uri: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrackingSettings(tracking="mlflow", tracking_uri=uri)
    [error] = caught.value.errors()
    assert said in error["msg"]
    assert "secret" not in error["msg"]
    with pytest.raises(ValidationError, match="set tracking=mlflow"):
        TrackingSettings(tracking_uri="https://host")


def test_without_an_address_it_is_the_one_of_the_environment_or_a_file_beside_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_mlflow.install(monkeypatch)
    job = Job(Run(tmp_path / "mine" / "adatt"), TRAIN)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow.Mlflow(job, None).uri == f"sqlite:///{tmp_path}/mine/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://host")
    assert mlflow.Mlflow(job, None).uri is None
    assert re.match("https://other", mlflow.Mlflow(job, "https://other").uri or "")
