"""Figures without a value: pages and tables say why."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nightly_world import encode_day, spoiled, train_run, write_day
from pages_by_hand import METRICS, checked, model, record

from pipeline.evaluation.explain.explain import ExplainConfig, explain
from pipeline.evaluation.explain.tables import tables
from pipeline.evaluation.follow import EvaluateConfig, Evaluation
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.report import page
from pipeline.run.headline import why_undefined


@pytest.mark.parametrize(
    ("kind", "labels", "predictions", "observed", "why"),
    [
        ("binary", [0, 1, 1], [0.1, math.nan, math.inf], True, "2 of 3 predictions are not finite"),
        ("binary", [0, 0, 0], [0.1, 0.2, 0.3], True, "no label is 1"),
        ("binary", [1, 1, 1], [0.1, 0.2, 0.3], True, "all labels are 1"),
        ("binary", [0, 1, 1], [0.1, 0.2, 0.3], False, "no rows"),
        ("regression", [1, 2, 3], [math.nan, 2, 3], True, "1 of 3 predictions are not finite"),
        ("regression", [2, 2, 2], [1, 2, 3], True, "all labels are equal"),
        ("regression", [1, 2, 3], [1, 2, 3], False, "no rows"),
        ("regression", [1, 2, 3], [1e300, 2, 3], True, "no finite value"),  # its square is too large
    ],
)
def test_why_a_figure_is_undefined(kind: str, labels: list, predictions: list, observed: bool, why: str):
    metrics = Metrics([("t", kind)])
    label_BT, logit_BT = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (labels, predictions))
    metrics.update(logit_BT, label_BT, torch.full((3, 1), observed), torch.ones(3, 1))
    found = metrics.compute()["t"]
    assert found["ne" if kind == "binary" else "nrmse"] is None
    assert why_undefined(found) == why


def test_a_model_whose_predictions_are_nan_is_named_on_its_page_and_by_explain(tmp_path: Path):
    write_day(tmp_path / "log", 0, 600)
    encode_day(tmp_path / "log", tmp_path / "days", 0)
    run = train_run(tmp_path / "days", tmp_path / "run", last=0, steps=4)
    run = spoiled(run, tmp_path / "nan", lambda name, x: x * torch.nan if name.startswith("towers.") else x)
    evaluation = Evaluation(EvaluateConfig(run=run.path, step="newest", threads=1, by_time=[], cold_start=False))
    [last] = evaluation.records()
    page.write_run(evaluation.results())
    rows = last["rows_evaluated"]
    parsed = checked(run.report.read_text())
    why, shown = f"{rows} of {rows} predictions are not finite", parsed.shown()
    assert f"Undefined: click ({why}), save ({why}), dwell ({why})." in shown
    assert [text for _, text in parsed.texts].count(why) == 3  # a card each
    assert "\n1 checkpoint over 256 training rows.\n" in shown
    found = explain(ExplainConfig(run=run.path, split="test", features=["user"], permutations=1, threads=1))
    assert f"\n\nUndefined: click ({why}), save ({why}), dwell ({why}).\n\n" in tables(found)
    page.write_run(evaluation.results())
    assert [text for _, text in checked(run.report.read_text()).texts].count(why) == 6  # and a drawing each


def test_only_the_tasks_without_a_value_are_named():
    of = replace(model(), records=[record(200, {**METRICS, "click": {**METRICS["click"], "ne": None}})], evaluated=None)  # type: ignore[dict-item]
    shown = checked(page.run_page(of)).shown()
    assert "1 of 2 tasks is better" in shown
    assert "Undefined: click (no finite value)." in shown
    assert "1 checkpoint over 20,000 training rows; lowest dwell 0.9300 at step 200." in shown
    assert "Undefined" not in checked(page.run_page(model())).shown()
