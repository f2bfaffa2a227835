"""A run that does not learn says so once per task and cause, with what its figures support; one that learns says nothing."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import configuration

from pipeline.run.run import Run
from pipeline.run.tracking.registry import Sinks
from pipeline.training.logging.learning_check import ROWS, WINDOWS, Fault, faults
from pipeline.training.logging.metrics_writer import MetricsWriter
from pipeline.training.train import prepare

LR = 0.01


def series(
    count: int = 20, rows: int = 1000, weight: dict[str, float] | None = None, loss: float = 100.0, **tasks: Any
) -> list[dict[str, Any]]:
    """Records whose figures are functions of the window's place; names that begin with m are of regressions."""
    records = []
    for i in range(count):
        ne, mse = ({t: f(i) for t, f in tasks.items() if t.startswith("m") == m} for m in (False, True))
        record = {"step": i + 1, "rows": rows * (i + 1), "lr": LR, "loss": loss, "ne": ne, "task_loss": mse}
        records.append(record | {"weight": dict.fromkeys(tasks, 1.0) | (weight or {})})
    return records


def noisy(level: float, slope: float = 0.0, noise: float = 0.01, seed: int = 0):
    draws = np.random.default_rng(seed).normal(0, noise, 1000)
    return lambda i: float(level + slope * i + draws[i])


def falling(start: float, end: float):
    return lambda i: end + (start - end) * math.exp(-i / 3) + 0.001 * (i % 2)


def none(i: int) -> None:
    return None


def lines(records: list[dict[str, Any]]) -> list[Fault]:
    """All faults of a run, in the order in which they are found."""
    found: list[Fault] = []
    for end in range(1, len(records) + 1):
        found += faults(records[:end], {(f.task, f.cause) for f in found})
    return found


def only(records: list[dict[str, Any]]) -> Fault:
    [fault] = lines(records)
    return fault


def test_a_run_that_learns_has_no_line() -> None:
    assert not lines(series(200, click=falling(3.5, 0.8), sale=falling(1.0, 0.9), m=falling(9, 4)))


@pytest.mark.parametrize("seed", range(12))
def test_noise_around_the_base_rate_has_no_line(seed: int) -> None:
    assert not lines(series(200, click=noisy(0.999, noise=0.05, seed=seed), m=noisy(4, noise=0.1, seed=seed + 10)))


def test_a_task_at_the_base_rate_whose_windows_grow_harder_by_day_and_easier_by_night_has_no_line() -> None:
    assert not lines(series(200, click=lambda i: 0.9 + 0.03 * math.sin(i), m=lambda i: 4 + 0.1 * math.sin(i)))


def test_ne_that_stays_above_1_is_a_learning_rate_that_is_too_high() -> None:
    fault = only(series(click=noisy(1.8), m=falling(9, 4)))
    assert fault[:2] == ("click", "worse than no model")
    assert fault.line.startswith("click: NE 1.8")
    assert "likely the learning rate is too high. Lower train.dense.lr (0.01 now)" in fault.line
    assert "\n" not in fault.line


def test_nothing_is_judged_before_enough_rows_and_windows() -> None:
    assert not lines(series(20, rows=ROWS // 21, click=noisy(1.8)))
    assert not lines(series(2 * WINDOWS - 1, rows=ROWS, click=noisy(1.8)))
    [fault] = faults(series(2 * WINDOWS, rows=ROWS // (2 * WINDOWS), click=noisy(1.8)))
    assert f"{ROWS:,} rows" in fault.line


def test_ne_that_still_falls_from_above_1_is_a_start_far_from_the_base_rate() -> None:
    fault = only(series(12, click=lambda i: 3.5 - 0.1 * i, m=falling(9, 4)))
    assert "but falling: a start far from the base rate, or slow learning. Set model.start=base_rate" in fault.line


def test_a_task_whose_loss_is_lost_beside_a_regression_names_it() -> None:
    fault = only(series(click=noisy(1.1), m=noisy(400, slope=-0.1), loss=400.5))
    assert "m makes 100% of the loss. Weigh it more, with +train.weighting.weights.click=… where" in fault.line


def test_a_task_of_little_weight_names_the_heaviest() -> None:
    fault = only(series(click=noisy(1.1), sale=falling(1, 0.8), weight={"click": 0.001, "sale": 2.0}))
    assert "its weight is 0.001, that of sale 2" in fault.line


def test_a_task_that_rises_while_others_fall_conflicts_with_them() -> None:
    fault = only(series(60, click=falling(1, 0.7), sale=noisy(0.6, slope=0.01), m=noisy(4)))
    assert fault[:2] == ("sale", "rising")
    assert "while click fell: the tasks likely conflict" in fault.line


def test_a_regression_that_rises_is_named_with_its_loss() -> None:
    fault = only(series(60, click=falling(1, 0.7), m=noisy(4, slope=0.05)))
    assert "rows loss has risen from 4." in fault.line


def test_losses_below_0_are_not_compared_by_their_ratio() -> None:
    assert not lines(series(100, click=falling(1, 0.7), m=lambda i: -2.0 + 0.001 * i + 0.0001 * (i % 3)))


def test_a_regression_that_began_better_than_it_is_names_the_learning_rate() -> None:
    fault = only(series(m=lambda i: 4.0 if i == 0 else 50 - 2 * i, click=falling(1, 0.8)))
    assert "worse than the untrained model's 4.0000: likely the learning rate is too high" in fault.line


def test_a_regression_is_not_compared_with_a_first_record_that_is_not_the_untrained_models() -> None:
    records = series(m=lambda i: 4.0 if i == 0 else 50 - 2 * i, click=falling(1, 0.8))
    assert not lines([record | {"step": record["step"] + 100} for record in records])


def test_a_regression_that_diverges_is_no_reason_of_another_tasks_fault() -> None:
    found = lines(series(m=lambda i: 4.0 if i == 0 else 5000 - 20 * i, click=noisy(1.3), loss=5001.0))
    assert {f[:2] for f in found} == {("m", "worse than no model"), ("click", "worse than no model")}
    assert all("learning rate is too high" in f.line for f in found)


def test_tasks_that_all_rise_are_a_learning_rate_that_is_too_high() -> None:
    found = lines(series(60, click=noisy(0.7, slope=0.004), sale=noisy(0.6, slope=0.004)))
    assert {f[:2] for f in found} == {("click", "rising"), ("sale", "rising")}
    assert all("no other task fell: likely the learning rate is too high" in f.line for f in found)


def test_a_task_without_labels_or_with_one_class_is_named_once_and_one_window_with_both_is_enough() -> None:
    found = lines(series(50, click=none, m=none, sale=falling(1, 0.8)))
    assert [f[:2] for f in found] == [("click", "no labels"), ("m", "no labels")]
    assert "of one class in each of the last 10 windows" in found[0].line
    assert "no label is observed" in found[1].line
    assert not lines(series(50, click=lambda i: 0.9 if i == 3 else None, sale=falling(1, 0.8)))


def test_a_line_that_a_rollback_takes_back_comes_again_and_one_before_it_does_not(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    (run.path / "metrics").mkdir(parents=True)
    records = series(17, click=noisy(1.8), sale=lambda i: 0.9 if i < 12 else 1.5 + 0.001 * (i % 2))
    records = [record | {"rows_per_s": 1.0, "data_wait": 0.0, "seconds_left": 0.0} for record in records]
    writer, written = MetricsWriter(run, ["click", "sale"], 0, 17, Sinks()), list[tuple[int, str]]()

    def log(steps: range) -> None:
        for step in steps:
            record = dict(records[step - 1])
            writer.log(record)
            written.extend((step, task) for task, _, _ in record.get("faults", []))

    log(range(1, 18))
    [(_, first), (found, second)] = written
    assert (first, second) == ("click", "sale")
    writer.roll_back(12)
    log(range(13, 18))
    assert written[2:] == [(found, "sale")]


@pytest.mark.integration
@pytest.mark.parametrize(("lr", "learns"), [(0.003, True), (10.0, False)])
def test_a_run_with_too_high_a_learning_rate_says_so_once_and_a_healthy_one_says_nothing(
    folder: Path, device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture, lr: float, learns: bool
) -> None:
    steps = {"batch_size": 64, "epochs": 30, "max_steps": 180, "log_every": 15, "dense": {"lr": lr}}
    config = configuration(folder / "data", tmp_path / "run", **steps)
    with caplog.at_level(logging.WARNING, "pipeline.training.logging"):
        prepare(config, None, device).run_to_end()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics" / "train.jsonl").read_text().splitlines()]
    assert records[-1]["rows"] > ROWS
    warned = [tuple(fault) for record in records for fault in record.get("faults", [])]
    messages = [r.getMessage() for r in caplog.records if r.name.endswith("metrics_writer")]
    if learns:
        assert not warned
        assert not messages
        return
    assert len({fault[:2] for fault in warned}) == len(warned)
    assert ("dwell", "worse than no model") in {fault[:2] for fault in warned}  # NE is above 1 too, but in noise
    assert (
        "learning rate is too high. Lower train.dense.lr (10 now)" in {fault[0]: fault[2] for fault in warned}["dwell"]
    )
    assert messages[:-1] == [fault[2] for fault in warned]
    assert messages[-1].startswith("not all was learnt: dwell (worse than no model)")

    caplog.clear()
    more = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 195})})
    with caplog.at_level(logging.WARNING, "pipeline.training.logging"):
        prepare(more, None, device).run_to_end()
    known = {fault[:2] for fault in warned}
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics" / "train.jsonl").read_text().splitlines()][-1]
    assert not known & {(task, cause) for task, cause, _ in again.get("faults", [])}, "a resumed run repeats no line"
