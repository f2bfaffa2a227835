"""A model's metrics with 95% intervals, and their changes to a baseline, paired by bucket where both have the same rows."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

from pipeline.evaluation.metrics.evaluated import ALL, paired, with_intervals
from pipeline.evaluation.metrics.intervals import quantile, reach_of
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.report.content import Estimate, Model
from pipeline.run.headline import why_undefined

CONFIDENCE = 0.95
MEAN_LABEL = 1.0  # of a headline metric: what predicting the mean label has


class Change(NamedTuple):
    """A metric of two models: theirs, and ours - theirs in itself and relative to theirs."""

    theirs: float | None
    delta: Estimate
    relative: Estimate


def label(kind: str, metric: str) -> str:
    """A metric's name on a page."""
    known = METRICS.get(kind, {}).get(metric)
    short = known.label if known else ""
    return short if short.upper() == short and short else metric.replace("_", " ")


def estimates(model: Model) -> dict[tuple[str, str], Estimate]:
    """By task of the model and metric the figures of the newest record over all rows.

    Intervals are those of the file of all figures, or else of the record's standard errors; None where neither has one.
    """
    errors = model.last.get("intervals") or {}
    found = {
        (task, name): around(value, errors.get(task, {}).get(name), reach_of(model.last, task, name, CONFIDENCE))
        for task, metrics in model.last.get("metrics", {}).items()
        for name, value in metrics.items()
    }
    if model.evaluated is not None:
        lines = with_intervals(model.evaluated.figures.filter(slice=ALL), CONFIDENCE)
        for line in lines.select("task", "metric", "value", "low", "high").iter_rows():
            found[line[0], line[1]] = Estimate(*line[2:])
    return {key: one for key, one in found.items() if key[0] in model.kinds}


def undefined(model: Model) -> dict[str, str]:
    """Of each task whose headline metric has no value in the newest record: why."""
    metrics = model.last.get("metrics", {})
    tasks = [task for task in model.kinds if model.metric(task) is None]
    return {task: why_undefined(metrics.get(task, {})) for task in tasks}


def around(value: float | None, error: float | None, reach: float) -> Estimate:
    """value ± reach · error. None and NaN, where there is no error, have no interval."""
    if value is None or error is None or not reach >= 0 or not error >= 0:
        return Estimate(value)
    return Estimate(value, value - reach * error, value + reach * error)


def changes(model: Model, baseline: Model) -> dict[tuple[str, str], Change]:
    """By task and metric the change to a baseline over all rows; without intervals where it cannot be paired."""
    ours, theirs = estimates(model), estimates(baseline)
    found = {key: _difference(ours[key].value, theirs[key].value) for key in ours.keys() & theirs.keys()}
    if pairs(model, baseline):
        assert model.evaluated is not None
        assert baseline.evaluated is not None
        lines = paired(model.evaluated, baseline.evaluated).filter(pl.col("slice") == ALL)
        reach = quantile(CONFIDENCE, lines["buckets"].to_numpy())
        for line, far in zip(lines.iter_rows(named=True), reach.tolist(), strict=True):
            if line["task"] not in model.kinds:
                continue
            found[line["task"], line["metric"]] = Change(
                line["theirs"],
                around(line["delta"], line["se"], far),
                around(line["relative"], line["relative_se"], far),
            )
    return found


def pairs(model: Model, baseline: Model) -> bool:
    """Whether two models have all figures of the same rows in the same buckets."""
    ours, theirs = model.evaluated, baseline.evaluated
    return ours is not None and theirs is not None and ours.provenance.same_rows(theirs.provenance)


def _difference(ours: float | None, theirs: float | None) -> Change:
    if ours is None or theirs is None:
        return Change(theirs, Estimate(), Estimate())
    return Change(theirs, Estimate(ours - theirs), Estimate(ours / theirs - 1 if theirs else None))


def direction(found: Estimate, higher_is_better: bool | None) -> str:
    """better or worse where the interval of a change excludes 0; otherwise empty."""
    if found.low is None or found.high is None or higher_is_better is None or found.low <= 0 <= found.high:
        return ""
    return "better" if (found.low > 0) == higher_is_better else "worse"


def mean_label_beaten(found: Mapping[tuple[str, str], Estimate], task: str, metric: str) -> bool:
    """Whether a headline metric is below that of predicting the mean label, its whole interval where it has one."""
    value = found.get((task, metric), Estimate())
    return value.value is not None and (value.high if value.high is not None else value.value) < MEAN_LABEL
