"""Intervals on simulated days of users whose rows are not independent: how often they hold the population's metric.

tests/benchmarks/intervals.py has more metrics, days and sizes.
"""

import numpy as np
import polars as pl
import pytest
from evaluated_by_hand import BINARY
from scipy.stats import nct
from simulated_log import SimulatedLog, evaluated_of, metrics_of, simulate

from pipeline.evaluation.metrics.evaluated import ALL, paired, with_intervals
from pipeline.evaluation.metrics.intervals import quantile

# Shapes: N rows.
DAYS, USERS, BUCKETS = 150, 800, 50
ERROR_M = (1.0, 1.0, 1.8)  # model b is as good as a, c is worse
METRICS = [("click", "ne"), ("click", "log_loss"), ("click", "auc"), ("click", "calibration"), ("spend", "calibration")]


@pytest.fixture(scope="module")
def logs() -> list[SimulatedLog]:
    return [simulate(np.random.default_rng([7, day]), USERS, ERROR_M) for day in range(DAYS)]


def over_days(logs: list[SimulatedLog], **options: bool | float) -> pl.DataFrame:
    """The first model's figures of all rows of each day, with intervals."""
    days = [evaluated_of(metrics_of(log, buckets=BUCKETS, spend=True, sliced=False, **options)).figures for log in logs]
    return with_intervals(pl.concat(days).filter(slice=ALL))


@pytest.fixture(scope="module")
def by_user(logs: list[SimulatedLog]) -> pl.DataFrame:
    return over_days(logs)


@pytest.fixture(scope="module")
def differences(logs: list[SimulatedLog]) -> pl.DataFrame:
    """Differences of two models each day, with the standard error that they would have on rows of different users."""
    days = []
    for log in logs:
        a, b, c = (evaluated_of(metrics_of(log, model, BUCKETS, sliced=False), names=("ne",)) for model in range(3))
        for name, other in (("b", b), ("c", c)):
            unpaired_se = (a.figures["se"] ** 2 + other.figures["se"] ** 2).sqrt()
            days.append(paired(a, other).with_columns(unpaired_se.alias("unpaired_se"), other=pl.lit(name)))
    return pl.concat(days).filter(metric="ne")


@pytest.fixture(scope="module")
def population() -> dict[tuple[str, str], float]:
    """The metrics of independent rows, as many as have an error far below that of a day."""
    log = simulate(np.random.default_rng(8), 400_000, one_row=True)
    p_N = 1 / (1 + np.exp(-log.logit_MN[0].astype(np.float64)))
    found = {("click", name): compute(log.click_N, p_N) for name, compute in BINARY.items()}
    loss_N = np.where(log.click_N == 1, -np.log(p_N), -np.log1p(-p_N))
    spend = float(log.prediction_N.sum(dtype=np.float64) / log.spend_N.sum(dtype=np.float64))
    return found | {("click", "log_loss"): float(loss_N.mean()), ("spend", "calibration"): spend}


def ratio_to_spread(figures: pl.DataFrame, task: str, metric: str) -> float:
    """Mean standard error over the standard deviation of the metric over days."""
    days = figures.filter(task=task, metric=metric)
    return days["se"].mean() / days["value"].std()


@pytest.mark.parametrize(("task", "metric"), METRICS)
def test_an_interval_of_95_percent_holds_the_populations_metric_on_95_percent_of_days(
    by_user: pl.DataFrame, population: dict[tuple[str, str], float], task: str, metric: str
) -> None:
    days = by_user.filter(task=task, metric=metric)
    assert days["value"].mean() == pytest.approx(population[task, metric], abs=0.3 * days["value"].std())
    held = days["low"].le(population[task, metric]) & days["high"].ge(population[task, metric])
    assert 0.91 <= held.mean() <= 0.985


@pytest.mark.parametrize(
    ("task", "metric"),
    [*METRICS, ("click", "pr_auc"), ("click", "gauc"), ("click", "ndcg"), ("spend", "mse"), ("spend", "xauc")],
)
def test_standard_errors_are_the_spread_of_a_metric_over_days(by_user: pl.DataFrame, task: str, metric: str) -> None:
    assert ratio_to_spread(by_user, task, metric) == pytest.approx(1, abs=0.2)


def test_with_rows_as_clusters_standard_errors_are_too_small(logs: list[SimulatedLog]) -> None:
    by_row = over_days(logs[:50], by_user=False)
    assert ratio_to_spread(by_row, "click", "log_loss") < 0.75
    assert ratio_to_spread(by_row, "spend", "calibration") < 0.5


def test_ranking_metrics_of_a_quarter_of_the_users_have_a_standard_error_of_their_own(logs: list[SimulatedLog]) -> None:
    kept = over_days(logs[:80], halvings=2)
    assert ratio_to_spread(kept, "click", "auc") == pytest.approx(1, abs=0.2)  # of all rows
    for task, metric in (("click", "gauc"), ("click", "ndcg"), ("spend", "xauc")):
        assert ratio_to_spread(kept, task, metric) == pytest.approx(1, abs=0.2)


def test_two_equally_good_models_differ_by_a_false_alarm_on_5_percent_of_days(differences: pl.DataFrame) -> None:
    days = differences.filter(other="b")
    reach = float(quantile(0.95, BUCKETS))
    assert 0.015 <= (days["delta"].abs() > reach * days["se"]).mean() <= 0.09
    assert days["se"].mean() == pytest.approx(days["delta"].std(), rel=0.2)
    assert days["relative_se"].mean() == pytest.approx(days["relative"].std(), rel=0.2)
    assert days["unpaired_se"].mean() > 3 * days["se"].mean()


def test_a_worse_model_is_found_as_often_as_students_t_says(differences: pl.DataFrame) -> None:
    days = differences.filter(other="c")
    reach = float(quantile(0.95, BUCKETS))
    power = nct.sf(reach, BUCKETS - 1, -days["delta"].mean() / days["delta"].std())
    assert 0.3 < power < 0.95
    assert (-days["delta"] > reach * days["se"]).mean() == pytest.approx(power, abs=0.1)
    assert not (-days["delta"] > reach * days["unpaired_se"]).any()
