"""What gates are judged on: a candidate's figures by task, metric and slice, and their changes to the serving one's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from pipeline.evaluation.metrics.evaluated import ALL, Evaluated, as_array, paired
from pipeline.evaluation.metrics.intervals import buckets_used, quantile
from pipeline.evaluation.metrics.registry import TOTALS
from pipeline.evaluation.metrics.slice_names import covers
from pipeline.release.gates_config import Gate

Key = tuple[str, str, str]  # task, metric, slice


@dataclass(frozen=True)
class Estimate:
    """A figure or a change of one, its standard error (0: exact, None: unknown), the buckets of this, and the rows.

    Attributes:
        has_intervals: whether the metric was evaluated with intervals: its standard error is unknown for want of buckets then.
    """

    value: float
    se: float | None
    buckets: int
    rows: int
    has_intervals: bool = True

    def reach(self, confidence: float) -> float | None:
        """How far a one-sided bound is from the estimate; None without a standard error."""
        if not self.se:
            return self.se
        reach = float(quantile(confidence, self.buckets, sides=1)) * self.se
        return reach if math.isfinite(reach) else None


class Figures:
    """Figures of a candidate and of the serving checkpoint (None: there is none yet), on the same rows.

    Args:
        gates: their metrics and slices are kept.
    Raises:
        UserError: on reading a change, if they are not of the same rows.
    """

    def __init__(self, gates: Iterable[Gate], candidate: Evaluated, serving: Evaluated | None) -> None:
        given = [*gates]
        self.candidate = _of_gates(given, candidate)
        self.serving = _of_gates(given, serving) if serving else None
        self._ours, self._theirs = _by_key(self.candidate), _by_key(self.serving) if self.serving else {}

    def covered(self, task: str, metric: str, patterns: Sequence[str]) -> list[str]:
        """The slices with rows, in order, that patterns or dimensions cover."""
        lines = self.candidate.figures.filter(task=task, metric=metric).select("dimension", "slice").iter_rows()
        return [name for dimension, name in lines if covers(patterns, dimension, name)]

    def rows(self, key: Key) -> int:
        """Of a slice, that count for the task; 0 where it did not occur."""
        return self._ours[key]["rows"] if key in self._ours else 0

    def ours(self, key: Key) -> Estimate | None:
        """A figure of the candidate; None where it is undefined or the slice did not occur."""
        line = self._ours.get(key)
        if line is None or not _finite(line["value"]):
            return None
        return Estimate(line["value"], _se(key, line["se"]), line["buckets"], line["rows"], line["intervals"])

    def theirs(self, key: Key) -> float | None:
        """A figure of the serving checkpoint."""
        line = self._theirs.get(key)
        return line["value"] if line and _finite(line["value"]) else None

    def change(self, key: Key, relative: bool) -> Estimate | None:
        """Candidate - serving, or this over serving's absolute value, with the standard error paired by bucket."""
        theirs, line = self.theirs(key), self._changes.get(key)
        if line is None or theirs is None or not _finite(line["relative" if relative else "delta"]):
            return None  # of a relative change also where serving's value is 0
        value, se = (math.copysign(1, theirs) * line["relative"], "relative_se") if relative else (line["delta"], "se")
        return Estimate(value, _se(key, line[se]), line["buckets"], line["rows"], self._ours[key]["intervals"])

    @cached_property
    def _changes(self) -> dict[Key, dict[str, Any]]:
        if self.serving is None:
            return {}
        return {
            (line["task"], line["metric"], line["slice"]): line
            for line in paired(self.candidate, self.serving).to_dicts()
        }


def _of_gates(gates: Sequence[Gate], evaluated: Evaluated) -> Evaluated:
    """Only what gates name, and whether predictions are finite."""
    metrics, names = {gate.metric for gate in gates} | {"non_finite"}, {gate.slice for gate in gates} | {ALL}
    patterns = sorted({pattern for gate in gates for pattern in gate.slices or ()})
    slices = evaluated.figures.select("dimension", "slice").unique().iter_rows()
    names |= {name for dimension, name in slices if covers(patterns, dimension, name)}
    kept = pl.col("metric").is_in(sorted(metrics)) & pl.col("slice").is_in(sorted(names))
    return Evaluated(evaluated.figures.filter(kept), evaluated.provenance)


def _by_key(evaluated: Evaluated) -> dict[Key, dict[str, Any]]:
    figures = evaluated.figures.select("task", "metric", "slice", "rows", "value", "se")
    used = [int(buckets_used(as_array(left_out))) for left_out in evaluated.figures["left_out"]]
    kept = (evaluated.figures["left_out"].list.len() > 0).alias("intervals")
    lines = figures.with_columns(pl.Series("buckets", used, pl.Int64), kept).to_dicts()
    return {(line["task"], line["metric"], line["slice"]): line for line in lines}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _se(key: Key, se: float | None) -> float | None:
    return 0.0 if key[1] in TOTALS else se if _finite(se) else None
