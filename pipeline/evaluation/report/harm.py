"""How much each slice harms a task's headline metric: by how much the metric of all rows would fall without its excess.

A slice's excess is its loss above that of a reference on the same rows: the baseline's loss there, or, without a baseline, the
loss that the rest of the rows would have with the slice's labels, its NE (regression: its NRMSE) times what predicting the
slice's mean label costs. So a slice of rare labels or hard ones is not blamed for them, and a small slice harms little.
"""

# Shapes: S slices, V = 1 + K values: of all rows, then without each of K buckets.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.evaluation.metrics.evaluated import ALL, Evaluated, as_array
from pipeline.evaluation.metrics.intervals import buckets_used, quantile, standard_error
from pipeline.evaluation.report.content import Estimate
from pipeline.evaluation.report.estimates import CONFIDENCE, around
from pipeline.run.headline import HEADLINE

NEEDED = {
    "binary": ("weight_sum", "base_rate", "log_loss", HEADLINE["binary"]),
    "regression": ("weight_sum", "label_mean", "mse", HEADLINE["regression"]),
}
Values = dict[str, np.ndarray]  # metric → value_SV


@dataclass(frozen=True)
class Harm:
    """One slice of a task.

    Attributes:
        dimension: what it is a value of. share: of the weight of all rows. value: its headline metric.
        reference: that of the rest, or the baseline's there.
        harm: by how much the headline metric of all rows would fall.
    """

    dimension: str
    name: str
    rows: int
    share: float
    value: Estimate
    reference: float | None
    harm: Estimate


def harms(
    evaluated: Evaluated, task: str, kind: str, baseline: Evaluated | None = None, minimum: int = 1
) -> list[Harm]:
    """The slices of a task that have `minimum` rows, the most harmful first; those whose harm is undefined last.

    Args:
        baseline: of the same rows in the same buckets; None: the rest of the rows is the reference.
    """
    lines = evaluated.figures.filter(pl.col("task") == task)
    slices = lines.filter((pl.col("slice") != ALL) & (pl.col("rows") >= minimum))
    slices = slices.filter(pl.col("metric") == HEADLINE[kind])
    names = [ALL, *slices["slice"]]
    ours = values_of(lines, names, NEEDED[kind])
    if ours is None or len(names) == 1:
        return []
    theirs = None
    if baseline is not None:
        theirs = values_of(baseline.figures.filter(pl.col("task") == task), names, NEEDED[kind])
    with np.errstate(all="ignore"):
        harm_SV, reference_SV, share_SV = (_binary if kind == "binary" else _regression)(ours, theirs)
    headline = _estimates(ours[HEADLINE[kind]][1:])
    found = [
        Harm(dimension, name, rows, float(share_V[0]), value, _finite(reference_V[0]), harm)
        for (dimension, name, rows), share_V, value, reference_V, harm in zip(
            slices.select("dimension", "slice", "rows").iter_rows(), share_SV, headline, reference_SV,
            _estimates(harm_SV), strict=True,
        )
    ]  # fmt: skip
    return sorted(found, key=lambda one: -np.inf if one.harm.value is None else one.harm.value, reverse=True)


def values_of(lines: pl.DataFrame, names: Sequence[str], metrics: Sequence[str]) -> Values | None:
    """value_SV of each metric and slice, NaN where there is none; None where a metric has no line at all.

    A metric without values by bucket, such as a sum of weights, is taken as the same without each.
    """
    by_metric = {key[0]: part for key, part in lines.group_by("metric")}
    if any(metric not in by_metric for metric in metrics):
        return None
    buckets = max((len(x) for x in lines["left_out"]), default=0)
    found: Values = {}
    for metric in metrics:
        part = by_metric[metric].unique("slice", keep="last")
        columns = zip(part["slice"], part["value"], part["left_out"], strict=True)
        known = {name: (value, as_array(left_out)) for name, value, left_out in columns}
        found[metric] = np.stack([_row(known.get(name), buckets) for name in names])
    return found


def _row(known: tuple[float | None, np.ndarray] | None, buckets: int) -> np.ndarray:
    value, left_out_K = known if known else (None, np.zeros(0))
    first = np.nan if value is None else value
    return np.concatenate([[first], left_out_K if len(left_out_K) == buckets else np.full(buckets, first)])


def _binary(ours: Values, theirs: Values | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight_SV, rate_SV, loss_SV = (ours[name] for name in ("weight_sum", "base_rate", "log_loss"))
    share_SV = weight_SV[1:] / weight_SV[:1]
    entropy_SV = _entropy(rate_SV)
    if theirs is not None:
        reference_SV, reference_loss_SV = theirs["ne"][1:], theirs["log_loss"][1:]
    else:
        rest_rate_SV, rest_loss_SV = (_rest(x_SV, share_SV) for x_SV in (rate_SV, loss_SV))
        reference_SV = rest_loss_SV / _entropy(rest_rate_SV)
        reference_loss_SV = reference_SV * entropy_SV[1:]
    return share_SV * (loss_SV[1:] - reference_loss_SV) / entropy_SV[:1], reference_SV, share_SV


def _regression(ours: Values, theirs: Values | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight_SV, mean_SV, mse_SV = (ours[name] for name in ("weight_sum", "label_mean", "mse"))
    share_SV = weight_SV[1:] / weight_SV[:1]
    variance_SV = mse_SV / ours["nrmse"] ** 2
    if theirs is not None:
        reference_SV, reference_mse_SV = theirs["nrmse"][1:], theirs["mse"][1:]
    else:
        rest_mean_SV, rest_square_SV = (_rest(x_SV, share_SV) for x_SV in (mean_SV, variance_SV + mean_SV**2))
        reference_SV = np.sqrt(_rest(mse_SV, share_SV) / (rest_square_SV - rest_mean_SV**2))
        reference_mse_SV = reference_SV**2 * variance_SV[1:]
    improved_SV = np.maximum(mse_SV[:1] - share_SV * (mse_SV[1:] - reference_mse_SV), 0.0)
    return np.sqrt(mse_SV[:1] / variance_SV[:1]) - np.sqrt(improved_SV / variance_SV[:1]), reference_SV, share_SV


def _rest(mean_SV: np.ndarray, share_SV: np.ndarray) -> np.ndarray:
    """Means over the rows outside of each slice, from those of all rows (the first) and of the slices."""
    return (mean_SV[:1] - share_SV * mean_SV[1:]) / (1 - share_SV)


def _entropy(rate_SV: np.ndarray) -> np.ndarray:
    """Log loss, in nats, of predicting the base rate."""
    inside_SV = (rate_SV > 0) & (rate_SV < 1)
    p_SV = np.where(inside_SV, rate_SV, 0.5)
    entropy_SV = -(p_SV * np.log(p_SV) + (1 - p_SV) * np.log1p(-p_SV))
    return np.where(np.isnan(rate_SV), np.nan, np.where(inside_SV, entropy_SV, 0.0))


def _estimates(value_SV: np.ndarray) -> list[Estimate]:
    """Values with intervals from their values without each bucket."""
    error_S = standard_error(value_SV[:, 1:])
    reach_S = quantile(CONFIDENCE, buckets_used(value_SV[:, 1:]))
    rows = zip(value_SV[:, 0].tolist(), error_S.tolist(), reach_S.tolist(), strict=True)
    return [around(value, error, reach) if np.isfinite(value) else Estimate() for value, error, reach in rows]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
