"""Whole runs under tracking: each sink has the figures of train.jsonl and eval.jsonl, once, after crashes and rollbacks too."""

import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import fake_mlflow
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import configuration, make_dataset

from features.plain_json import read_json
from pipeline.dataset.card.page import page_file
from pipeline.evaluation.follow import EvaluateConfig, Evaluation
from pipeline.evaluation.report import page
from pipeline.run.run import Run
from pipeline.storage.files import read_lines
from pipeline.training.config import TrainConfig
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("device")]
URI = "sqlite:////fake"


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, port: int) -> dict[str, Any]:
    fake_mlflow.install(monkeypatch)
    return {"tracking": "mlflow", "tracking_uri": URI, "metrics_port": port}


def scrape(port: int) -> dict[str, float]:
    """Samples by name, those without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


class Crash(Observer):
    """Ends a run after a step, once it has looked at the endpoint."""

    def __init__(self, step: int, port: int) -> None:
        self.step, self.port, self.seen = step, port, dict[str, float]()

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step == self.step:
            self.seen = scrape(self.port)
            raise RuntimeError("killed")


def mlflow_run() -> fake_mlflow.FakeRun:
    [run] = fake_mlflow.STORES[URI].runs.values()
    return run


def points(key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in mlflow_run().metrics if metric.key == key]


def curve(folder: Path, tag: str) -> list[tuple[int, Any]]:
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars(tag)]


def test_a_training_that_crashed_and_resumed_is_one_run_with_every_step_once(
    folder: Path, device: torch.device, tmp_path: Path, settings: dict[str, Any], port: int
) -> None:
    config = configuration(folder / "data", tmp_path / "run", max_steps=20, checkpoint_every=5, checkpoint_async=False)
    config = config.model_copy(update=settings)
    page_file(config.dataset).write_text("<html>")
    crash = Crash(13, port)
    with pytest.raises(RuntimeError, match="killed"):
        prepare(config, None, device, [crash]).run_to_end()
    assert (crash.seen["taskfuse_train_step"], crash.seen["taskfuse_train_checkpoint_step"]) == (12, 10)
    assert mlflow_run().status == "FAILED"
    prepare(config, None, device).run_to_end()
    written = [(line["step"], line["loss"]) for line in read_lines(tmp_path / "run" / "metrics" / "train.jsonl")]
    assert [step for step, _ in written] == list(range(1, 21))
    assert written == curve(tmp_path / "run" / "tensorboard", "train/loss")
    assert written == sorted(points("train/loss"))
    assert mlflow_run().status == "FINISHED"
    assert mlflow_run().params["train.checkpoint_every"] == "5"
    assert set(mlflow_run().files) == {"data.card.html"}
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def test_a_training_on_days_publishes_the_card_of_the_newest_day_that_has_one(
    folder: Path, device: torch.device, tmp_path: Path, settings: dict[str, Any]
) -> None:
    days = [Path(shutil.copytree(folder / "data", tmp_path / f"2026-11-0{day}")) for day in (1, 2, 3, 4)]
    for day in (0, 1, 3):
        page_file(days[day]).write_text("<html>")
    config = configuration(tmp_path, tmp_path / "run", max_steps=1)
    config = config.model_copy(update=settings | {"metrics_port": None, "days": "2026-11-01..2026-11-03"})
    prepare(config, None, device).run_to_end()
    assert mlflow_run().files == ["2026-11-02.card.html"]


def test_steps_that_a_rollback_repeats_are_drawn_once(folder: Path, device: torch.device, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", spoil=("price", 100))
    config = configuration(tmp_path / "data", tmp_path / "run", max_steps=13, checkpoint_every=4, nonfinite="skip")
    prepare(config, None, device).run_to_end()
    written = [(line["step"], line["loss"]) for line in read_lines(tmp_path / "run" / "metrics" / "train.jsonl")]
    assert read_skipped(tmp_path / "run")
    assert written == curve(tmp_path / "run" / "tensorboard", "train/loss")


def read_skipped(run: Path) -> list[int]:
    """Steps whose batches the newest checkpoint has as skipped."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return list(read_json(newest, "manifest.json")["skipped"])


@pytest.fixture(scope="module")
def trained(folder: Path, device: torch.device) -> Run:
    config = configuration(folder / "data", folder / "evaluated", max_steps=6, checkpoint_every=2)
    prepare(config, None, device).run_to_end()
    return Run(config.run)


def test_evaluators_one_after_the_other_give_the_figures_of_eval_jsonl_once(
    trained: Run, settings: dict[str, Any], port: int
) -> None:
    for step in (4, "all"):
        evaluation = Evaluation(EvaluateConfig(run=trained.path, split="valid", step=step, threads=1, **settings))
        assert [record["step"] for record in evaluation.records()] == ([4] if step == 4 else [2, 6])
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    page.write_run(evaluation.results())
    evaluation.publish()
    written = sorted(read_lines(trained.eval_metrics), key=lambda line: line["step"])
    for task, metrics in written[0]["metrics"].items():
        for name in metrics:
            values = [(line["step"], line["metrics"][task][name]) for line in written]
            if None not in (value for _, value in values):
                assert values == curve(trained.tensorboard / "eval_valid", f"eval_valid/{task}/{name}")
                assert values == sorted(points(f"eval_valid/{task}/{name}"))
    assert mlflow_run().name == "evaluated"
    assert mlflow_run().files == ["report.html"]


def test_settings_of_tracking_are_no_part_of_what_a_checkpoint_depends_on(folder: Path, tmp_path: Path) -> None:
    plain = configuration(folder / "data", tmp_path / "run")
    tracked = TrainConfig.model_validate(plain.model_dump(by_alias=True) | {"tracking": "mlflow", "metrics_port": 1234})
    assert tracked.shape() == plain.shape()
