"""Sinks of figures: all members of the registry, TensorBoard and Prometheus. Every figure, once, and no error of theirs."""

import errno
import logging
import math
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_mlflow
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from features.errors import UserError
from features.yaml_text import yaml_of
from models.ranker import ModelConfig
from pipeline.evaluation.follow import EvaluateConfig, Evaluation
from pipeline.evaluation.tracked import check_settings, series_of, tracked, with_bounds
from pipeline.run.run import Run
from pipeline.run.tracking.base import (
    TRAIN,
    Committed,
    EvalRecord,
    Event,
    Job,
    Published,
    Recorded,
    RolledBack,
    TrainRecord,
)
from pipeline.run.tracking.registry import SINKS, Sinks, check, opened
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

HOSTILE = 'a"b\\c\n<x>{$/ü'


def trained(step: int, loss: float = 0.5, task: str = "click") -> dict[str, Any]:
    return {
        "step": step, "rows": 10 * step, "time": 1000.0 + step, "lr": 0.1, "loss": loss, "rows_per_s": 5000.0,
        "data_wait": 0.25, "seconds_left": 60.0, "weight": {task: 1.0}, "ne": {task: 0.9, "sale": None},
        "task_loss": {"dwell": 1.5},
    }  # fmt: skip


def evaluated(step: int, ne: float = 0.9, task: str = "click", **more: Any) -> dict[str, Any]:
    metrics = {task: {"ne": ne, "auc": 0.7, "calibration": 1.1, "gauc": None}, "dwell": {"nrmse": 0.8, "mse": 2.0}}
    record = {
        "step": step,
        "time": 1000.0 + step,
        "seconds": 4.0,
        "split": "test",
        "checkpoint": "c",
        "metrics": metrics,
    }
    return record | {"buckets": 20, "intervals": {task: {"ne": 0.01}}} | more


@pytest.fixture
def run(tmp_path: Path) -> Run:
    path = tmp_path / "mine" / "adatt"
    (path / "metrics").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml_of({"dataset": "/data", "model": {}, "train": {}}))
    return Run(path)


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def all_on(monkeypatch: pytest.MonkeyPatch, port: int) -> TrackingSettings:
    """Settings with which every member of the registry is opened."""
    fake_mlflow.install(monkeypatch)
    return TrackingSettings(tracking="mlflow", tracking_uri="sqlite:////fake", metrics_port=port)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve that TensorBoard shows of a folder."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples that Prometheus would read, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    families = list(text_string_to_metric_families(text))
    assert all(f.name.startswith("taskfuse_") and f.documentation and f.type == "gauge" for f in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


# All members


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("series", [TRAIN, "eval_test"])
def test_no_error_of_a_member_reaches_a_job_and_each_is_one_line(
    run: Run, all_on: TrackingSettings, name: str, series: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken: list[Event] = [TrainRecord({"step": 1}), EvalRecord({"step": 1}), Committed(1, 0.0), RolledBack(0)]
    with opened(Job(run, series, "test"), all_on, {name: SINKS[name]}) as sinks:
        assert list(sinks.members) == [name]
        for event in [*broken, *broken, Published(run.path / "none.html")]:
            sinks.handle(event)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == len(set(lines)) <= 2
    assert all(name in line and "\n" not in line for line in lines)
    assert lines


@pytest.mark.parametrize("name", SINKS)
def test_a_member_that_cannot_be_opened_is_left_out_with_one_line(
    run: Run, all_on: TrackingSettings, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(Job(run, TRAIN), all_on, {**SINKS, name: full}) as sinks:
        assert set(sinks.members) == set(SINKS) - {name}
    assert len([r for r in caplog.records if "No space left" in r.getMessage()]) == 1


@pytest.mark.parametrize("name", SINKS)
def test_errors_of_the_job_itself_pass_and_every_member_is_closed(
    run: Run, all_on: TrackingSettings, name: str
) -> None:
    closed = []

    class Watched:
        def handle(self, event: Event) -> None: ...

        def close(self, state: str) -> None:
            closed.append(state)
            raise RuntimeError

    with pytest.raises(KeyError), opened(Job(run, TRAIN), all_on, {"before": lambda *_: Watched(), name: SINKS[name]}):
        raise KeyError
    with opened(Job(run, TRAIN), all_on, {name: SINKS[name], "after": lambda *_: Watched()}):
        pass
    assert closed == ["failed", "finished"]


def test_members_that_are_off_by_default_open_nothing(run: Run) -> None:
    with opened(Job(run, TRAIN), TrackingSettings()) as sinks:
        assert list(sinks.members) == ["TensorBoard"]
    assert not (run.path / "mlflow.json").exists()


def test_of_an_evaluation_on_ranks_the_first_alone_has_sinks(
    run: Run, all_on: TrackingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        monkeypatch.setattr("pipeline.evaluation.tracked.rank_of", lambda rank=rank: (rank, 2))
        with tracked(all_on, run, "test", "eval_test", []) as sinks:
            assert set(sinks.members) == (set() if rank else set(SINKS))
            if rank == 0:
                with pytest.raises(UserError, match="in use"):
                    check_settings(all_on)
                monkeypatch.setattr("pipeline.evaluation.tracked.rank_of", lambda: (1, 2))
                check_settings(all_on)  # the port is the first rank's


# TensorBoard


def test_a_split_has_every_defined_figure_of_every_record_with_bounds_of_the_headline(run: Run) -> None:
    records = [with_bounds(evaluated(step, ne)) for step, ne in ((2, 0.95), (4, 0.9))]
    with opened(Job(run, "eval_test", "test"), TrackingSettings()) as sinks:
        for record in records:
            sinks.handle(EvalRecord(record))
    found = curves(run.tensorboard / "eval_test")
    assert set(found) == {
        *(f"eval_test/click/{name}" for name in ("ne", "auc", "calibration", "ne/low", "ne/high")),
        "eval_test/dwell/nrmse",
        "eval_test/dwell/mse",
    }
    assert found["eval_test/click/ne"] == [(2, pytest.approx(0.95)), (4, pytest.approx(0.9))]
    reach = 2.0930 * 0.01  # Student's t with 19 degrees of freedom, two sides of 95%
    assert found["eval_test/click/ne/low"][1] == (4, pytest.approx(0.9 - reach, abs=1e-5))
    assert found["eval_test/click/ne/high"][1] == (4, pytest.approx(0.9 + reach, abs=1e-5))
    assert curves(run.tensorboard) == {}  # that folder is the trainer's


def test_a_restarted_evaluator_draws_each_step_once_and_what_a_kill_left_out(run: Run) -> None:
    job, records = Job(run, "eval_test", "test"), [evaluated(step, step / 10) for step in (2, 4, 6, 8)]
    with opened(job, TrackingSettings()) as sinks:
        for record in records[:2]:
            sinks.handle(EvalRecord(record))
    # The third is in eval.jsonl, but its curve is not: the evaluator was killed in between.
    with opened(Job(run, "eval_test", "test", history=records[:3]), TrackingSettings()) as sinks:
        sinks.handle(EvalRecord(records[3]))
        sinks.handle(EvalRecord(evaluated(4, 0.45)))  # trained anew after a rollback
    wanted = [(2, 0.2), (4, 0.45), (6, 0.6), (8, 0.8)]
    found = curves(run.tensorboard / "eval_test")["eval_test/click/ne"]
    assert found == [(step, pytest.approx(value)) for step, value in wanted]


def test_two_evaluators_at_the_same_time_leave_no_gap_whoever_ends_first(run: Run) -> None:
    written: dict[int, dict[str, Any]] = {}

    def record(sinks: Sinks, step: int) -> None:
        written[step] = with_bounds(evaluated(step, step / 100))
        sinks.handle(EvalRecord(written[step]))

    def board() -> list[tuple[int, float]]:
        return [(step, round(value, 6)) for step, value in curves(run.tensorboard / "eval_test")["eval_test/click/ne"]]

    job, seen = Job(run, "eval_test", "test"), Recorded(written.values)
    with opened(job, TrackingSettings()) as one:
        with opened(job, TrackingSettings()) as two:
            record(one, 30)
            one.handle(seen)
            record(two, 60)
            two.handle(seen)
            assert board() == [(30, 0.3), (60, 0.6)]
            record(one, 45)
            record(two, 90)
            two.handle(seen)
        record(one, 120)
        one.handle(seen)
    assert board() == [(step, step / 100) for step in (30, 45, 60, 90, 120)]
    assert len(list((run.tensorboard / "eval_test").iterdir())) == 1


def test_evaluators_of_two_splits_and_of_another_dataset_do_not_touch_each_others_curves(run: Run) -> None:
    other = series_of("test", "/data/2026-11-22")
    assert other not in (series_of("test", None), series_of("test", "/elsewhere/2026-11-22"))
    assert other.startswith("eval_test_2026-11-22-")
    share = series_of("test", None, 0.05)
    assert share == "eval_test_share_0_05"  # its curves would take the place of those of the whole split
    assert series_of("test", None, 1.0) == "eval_test"
    for series, split, value in (("eval_test", "test", 0.1), ("eval_valid", "valid", 0.2), (other, "test", 0.3)):
        with opened(Job(run, series, split), TrackingSettings()) as sinks:
            sinks.handle(EvalRecord(evaluated(2, value, split=split)))
    with opened(Job(run, other, "test"), TrackingSettings()):  # begins anew, without its record
        pass
    folders = [run.tensorboard / series for series in ("eval_test", "eval_valid", other)]
    assert [list(curves(folder)) != [] for folder in folders] == [True, True, False]
    assert curves(folders[1])["eval_valid/click/ne"] == [(2, pytest.approx(0.2))]


def test_a_resumed_and_a_rolled_back_training_have_each_step_once(run: Run) -> None:
    with opened(Job(run, TRAIN), TrackingSettings()) as sinks:
        for step in (1, 2, 3):
            sinks.handle(TrainRecord(trained(step, 1.0)))
    with opened(Job(run, TRAIN, step=2), TrackingSettings()) as sinks:
        for event in (
            TrainRecord(trained(3, 2.0)),
            TrainRecord(trained(4, 2.0)),
            RolledBack(3),
            TrainRecord(trained(4, 3.0)),
        ):
            sinks.handle(event)
    found = curves(run.tensorboard)
    assert found["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    assert [step for step, _ in found["train_ne/click"]] == [1, 2, 3, 4]
    assert "train_ne/sale" not in found


def test_a_full_disk_costs_curves_and_one_line_and_curves_go_on_with_room(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = True

    class Writer(SummaryWriter):
        def add_scalar(self, *words: Any, **named: Any) -> None:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().add_scalar(*words, **named)

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    with opened(Job(run, "eval_test", "test"), TrackingSettings()) as sinks:
        for step in (2, 4):
            sinks.handle(EvalRecord(evaluated(step)))
        full = False
        sinks.handle(EvalRecord(evaluated(6)))
    assert [r.getMessage().count("No space left") for r in caplog.records] == [1]
    assert [step for step, _ in curves(run.tensorboard / "eval_test")["eval_test/click/ne"]] == [6]


def test_a_link_where_curves_of_a_split_belong_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "events.out.tfevents.1").touch()
    run.tensorboard.mkdir()
    (run.tensorboard / "eval_test").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="eval_test"), opened(Job(run, "eval_test", "test"), TrackingSettings()):
        pass
    assert (tmp_path / "outside" / "events.out.tfevents.1").exists()


# Prometheus


def test_prometheus_reads_the_newest_figures_of_a_training(run: Run, port: int) -> None:
    with opened(Job(run, TRAIN), TrackingSettings(metrics_port=port)) as sinks:
        assert scrape(port) == {}  # nothing is known, which is not 0
        sinks.handle(TrainRecord(trained(1)))
        sinks.handle(TrainRecord(trained(2, 0.25)))
        sinks.handle(Committed(2, 1700.5))
        found = scrape(port)
    plain = {name.removeprefix("taskfuse_train_"): value for (name, labels), value in found.items() if not labels}
    assert plain == {
        "step": 2, "rows": 20, "rows_per_second": 5000, "data_wait_ratio": 0.25, "loss": 0.25, "left_seconds": 60,
        "record_timestamp_seconds": 1002, "checkpoint_step": 2, "checkpoint_timestamp_seconds": 1700.5,
    }  # fmt: skip
    assert found[("taskfuse_train_ne", (("task", "click"),))] == 0.9
    assert math.isnan(found[("taskfuse_train_ne", (("task", "sale"),))])
    assert found[("taskfuse_train_task_loss", (("task", "dwell"),))] == 1.5


def test_prometheus_reads_the_newest_figures_of_an_evaluator_whatever_a_task_is_called(run: Run, port: int) -> None:
    lag = {"steps": 200, "seconds": 33.5}
    history = [evaluated(2, 0.95, HOSTILE), evaluated(1, 0.99, HOSTILE)]
    with opened(Job(run, "eval_test", "test", history=history), TrackingSettings(metrics_port=port)) as sinks:
        split, task = ("split", "test"), ("task", HOSTILE)
        assert scrape(port)[("taskfuse_eval_ne", (split, task))] == 0.95
        sinks.handle(EvalRecord(evaluated(4, 0.9, HOSTILE, lag=lag, rows_per_s=7000.0)))
        found = scrape(port)
    assert found[("taskfuse_eval_ne", (split, task))] == 0.9
    assert found[("taskfuse_eval_ne_standard_error", (split, task))] == 0.01
    assert found[("taskfuse_eval_calibration_ratio", (split, task))] == 1.1
    assert found[("taskfuse_eval_nrmse_ratio", (split, ("task", "dwell")))] == 0.8
    plain = {
        name.removeprefix("taskfuse_eval_"): value for (name, labels), value in found.items() if labels == (split,)
    }
    assert plain == {
        "step": 4, "record_timestamp_seconds": 1004, "duration_seconds": 4, "rows_per_second": 7000,
        "lag_steps": 200, "lag_seconds": 33.5,
    }  # fmt: skip


def test_prometheus_keeps_the_newest_checkpoint_while_older_ones_are_evaluated_after_it(run: Run, port: int) -> None:
    split = (("split", "test"),)
    with opened(Job(run, "eval_test", "test"), TrackingSettings(metrics_port=port)) as sinks:
        sinks.handle(EvalRecord(evaluated(60, 0.9, lag={"steps": 5, "seconds": 2.5})))
        sinks.handle(EvalRecord(evaluated(30, 0.95, lag={"steps": 35, "seconds": 40.0}) | {"time": 1100.0}))
        found = scrape(port)
        assert [found[f"taskfuse_eval_{name}", split] for name in ("step", "lag_steps", "lag_seconds")] == [60, 5, 2.5]
        assert found["taskfuse_eval_record_timestamp_seconds", split] == 1100
        assert found["taskfuse_eval_ne", (*split, ("task", "click"))] == 0.9
        sinks.handle(EvalRecord(evaluated(90, 0.9, lag={"steps": 0})))  # training has ended
        found = scrape(port)
    assert (found["taskfuse_eval_step", split], found["taskfuse_eval_lag_steps", split]) == (90, 0)
    assert math.isnan(found["taskfuse_eval_lag_seconds", split])


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def test_the_endpoint_is_on_loopback_and_gone_with_the_job(run: Run, port: int) -> None:
    before = listening()
    with opened(Job(run, TRAIN), TrackingSettings(metrics_port=port)):
        assert listening() - before == {("127.0.0.1", port)}
    assert listening() == before
    with opened(Job(run, TRAIN), TrackingSettings(metrics_port=port, metrics_host="0.0.0.0")):
        assert listening() - before == {("0.0.0.0", port)}


@pytest.fixture
def taken(port: int) -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", port))
        held.listen()
        yield port


def test_a_port_in_use_is_one_line_before_a_job_begins_and_closes_what_was_opened(run: Run, taken: int) -> None:
    settings, ended = TrackingSettings(metrics_port=taken), []

    class Watched:
        def handle(self, event: Event) -> None: ...

        def close(self, state: str) -> None:
            ended.append(state)

    with pytest.raises(UserError, match=rf"^metrics_port={taken} .*in use.*Choose another"):
        check(settings)
    with pytest.raises(UserError), opened(Job(run, TRAIN), settings, {"first": lambda *_: Watched(), **SINKS}):
        pass
    assert ended == ["failed"]
    model, path = ModelConfig(fusion={"name": "shared_bottom"}, tower=[4]), run.path / "new"
    with pytest.raises(UserError, match="in use"):
        train(TrainConfig(dataset=run.path / "data", run=path, model=model, train=Settings(), metrics_port=taken))
    assert not path.exists()
    with pytest.raises(UserError, match="in use"):
        Evaluation(EvaluateConfig(run=path, metrics_port=taken))
    with pytest.raises(UserError, match=r"no\.such\.host"):
        check(TrackingSettings(metrics_port=taken, metrics_host="no.such.host.invalid"))
