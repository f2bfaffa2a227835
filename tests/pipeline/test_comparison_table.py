"""Two evaluations side by side: values, intervals and marks by their formulas, the choice of slices."""

import re
from pathlib import Path

import numpy as np
import pytest
from evaluated_by_hand import around, evaluated, line
from scipy.stats import t as student_t

from features.errors import UserError
from pipeline.evaluation.compared_runs import Compared, parse_compared
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.evaluation.report.comparison_table import differences, table

KINDS = {"click": "binary", "watch": "regression"}
SLICES = ["all", *(f"device=d{n}" for n in range(14))]


def two_models(buckets: int = 10) -> tuple[Evaluated, Evaluated]:
    """Two models whose figures differ by chance."""
    rng = np.random.default_rng(3)
    both = []
    for _ in range(2):
        lines = []
        for task, metric in (("click", "ne"), ("click", "auc"), ("click", "log_loss"), ("watch", "nrmse")):
            for number, name in enumerate(SLICES):
                left_out = 0.8 + rng.normal(0, 0.001, buckets)
                left_out[number % buckets] = np.nan  # a bucket without rows of the slice
                lines.append(line(task, metric, 0.8 + rng.normal(0, 0.01), left_out, name, 100 + number))
        both.append(evaluated(lines))
    return both[0], both[1]


def t_of(ours: Evaluated, theirs: Evaluated, task: str, metric: str, name: str) -> tuple[float, float]:
    """The difference in standard errors, and half of its interval, in plain loops."""
    a, b = (x.figures.filter(task=task, metric=metric, slice=name) for x in (ours, theirs))
    of_bucket = [x - y for x, y in zip(a["left_out"][0], b["left_out"][0], strict=True) if np.isfinite(x - y)]
    count, mean = len(of_bucket), sum(of_bucket) / len(of_bucket)
    se = ((count - 1) / count * sum((x - mean) ** 2 for x in of_bucket)) ** 0.5
    return (a["value"][0] - b["value"][0]) / se, student_t.ppf(0.975, count - 1) * se


def test_each_line_is_the_paired_difference_with_its_interval() -> None:
    ours, theirs = two_models()
    found = differences(ours, theirs, KINDS)
    assert 0 < found["differs"].sum() < found.height
    for each in found.iter_rows(named=True):
        t, half = t_of(ours, theirs, each["task"], each["metric"], each["slice"])
        assert each["half"] == pytest.approx(half)
        assert each["delta"] / each["se"] == pytest.approx(t)
        assert each["differs"] == (abs(each["delta"]) > half)
        assert each["relative"] == pytest.approx(each["ours"] / each["theirs"] - 1)


@pytest.mark.parametrize("count", [0, 4, 10, 1000])
def test_the_slices_that_differ_most_follow_the_whole_split(count: int) -> None:
    ours, theirs = two_models()
    found = differences(ours, theirs, KINDS, count)
    ranked = sorted(
        ((task, metric, name) for task, metric in (("click", "ne"), ("watch", "nrmse")) for name in SLICES[1:]),
        key=lambda key: -abs(t_of(ours, theirs, *key)[0]),
    )
    whole = [("click", "ne", "all"), ("click", "auc", "all"), ("watch", "nrmse", "all")]
    assert found.select("task", "metric", "slice").rows() == whole + ranked[:count]


def test_slices_are_chosen_by_dimension_and_pattern() -> None:
    ours, theirs = two_models()
    assert set(differences(ours, theirs, KINDS, ["device"])["slice"]) == set(SLICES)
    assert set(differences(ours, theirs, KINDS, ["device=d1*"])["slice"]) == {
        "all", "device=d1", *(f"device=d1{n}" for n in range(4))
    }  # fmt: skip
    assert set(differences(ours, theirs, KINDS, ["os"])["slice"]) == {"all"}


def test_the_table_shows_what_differs_and_figures_without_intervals() -> None:
    left = np.array([0.79, 0.81, 0.8, 0.8])
    ours = [
        line("click", "ne", 0.79, left - 0.01),
        line("click", "auc", 0.7),
        line("click", "calibration", None, [None] * 4),
    ]
    theirs = [line("click", "ne", 0.8, left), line("click", "auc", 0.6), line("click", "calibration", 1.0, [1.0] * 4)]
    shown = table(evaluated(ours, run="runs/\x1b[1ma"), evaluated(theirs, run="runs/b"), {"click": "binary"})
    assert "\x1b" not in shown
    rows = {
        cells[1]: cells[2:] for text in shown.splitlines() if (cells := re.split(r"\s{2,}", text.strip()))[0] == "click"
    }
    assert rows["NE"] == ["all", "1,000", "0.7900", "0.8000", "-0.01000 ± 0.00000", "-1.25% ± 0.06%", "*"]
    assert rows["AUC"] == ["all", "1,000", "0.7000", "0.6000", "+0.10000 ± -", "+16.67% ± -"]
    assert rows["calib"] == ["all", "1,000", "-", "1.0000", "-", "-"]


def test_a_share_of_a_figure_below_zero_is_not_shown() -> None:
    both = [evaluated([line("watch", "r2", value, around(value, 0.001))]) for value in (0.1, -0.2)]
    for ours, theirs, shown in (
        (both[0], both[1], "+0.30000 ± 0.00000 - *"),
        (both[1], both[0], "-0.30000 ± 0.00000 -300.00%"),
    ):
        text = " ".join(table(ours, theirs, {"watch": "regression"}).split())
        assert shown in text


def test_other_rows_and_other_tasks_are_refused() -> None:
    ours = evaluated([line("click", "ne", 0.8, [0.8] * 4)])
    with pytest.raises(UserError, match="not evaluated on the same rows"):
        table(ours, evaluated([line("click", "ne", 0.8, [0.8] * 4)], share=0.1), {"click": "binary"})
    with pytest.raises(UserError, match="no task in common"):
        table(ours, evaluated([line("buy", "ne", 0.8, [0.8] * 4)]), {"click": "binary"})


@pytest.mark.parametrize(
    ("text", "run", "step"),
    [("runs/a", "runs/a", None), ("runs/a@300", "runs/a", 300), ("a@b/c", "a@b/c", None), ("a@1@2", "a@1", 2)],
)
def test_a_checkpoint_is_a_run_and_maybe_a_step(text: str, run: str, step: int | None) -> None:
    assert parse_compared(text) == Compared(Path(run), step)
