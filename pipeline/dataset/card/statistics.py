"""Statistics of a dataset's card: numbers, ids and tasks of the train split."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from features.fit.digest import Digest
from features.fit.encoders import Encoders
from features.fit.split_counts import FeatureCounts
from features.fit.statistics import Statistics
from features.kinds.moments import Moments
from features.schema.schema import Schema

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 20  # of a histogram
CELLS = 10  # of a number, for drift
TOP = 50  # values of an id feature that are listed
DIGITS = 12  # the precision of a digest


def number_statistics(statistics: Statistics, name: str) -> dict[str, Any]:
    """A number's missing share, moments, quantiles, histogram and cells (see `card`)."""
    digest, moments = statistics.digests[name], statistics.raw[name]
    found: dict[str, Any] = {"missing": share(statistics.missing[name], statistics.rows)}
    if not digest.count:
        return found | {
            **dict.fromkeys(("mean", "std", "min", "max")),
            "quantiles": {},
            "histogram": {"edges": [], "counts": []},
            "cells": {"edges": [], "shares": [0.0]},
        }
    edge, times = np.unique([rounded(digest.quantile(i / CELLS)) for i in range(1, CELLS)], return_counts=True)
    edges = np.repeat(edge, np.minimum(times, 2))
    return found | {
        "mean": rounded(moments.mean),
        "std": rounded(moments.std),
        "min": digest.minimum,
        "max": digest.maximum,
        "quantiles": {f"{share * 100:.0f}%": rounded(digest.quantile(share)) for share in QUANTILES},
        "histogram": _histogram(digest, moments),
        "cells": {"edges": edges.tolist(), "shares": cells(digest, edges).tolist()},
    }


def _histogram(digest: Digest, moments: Moments) -> dict[str, Any]:
    """Counts of the values between the first and the last percent, so that outliers do not flatten it."""
    low, high = digest.quantile(QUANTILES[0]), digest.quantile(QUANTILES[-1])
    if low == high:
        low, high = digest.minimum, digest.maximum
    if low == high:
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    edges = np.linspace(low, high, BINS + 1)
    up_to = np.array([digest.below(edges[0]), *map(digest.at_most, edges[1:])])
    counts = np.maximum(np.rint(np.diff(up_to) * moments.count), 0).astype(int)
    return {"edges": [rounded(edge) for edge in edges], "counts": counts.tolist()}


def cells(digest: Digest, edges: np.ndarray) -> np.ndarray:
    """Shares of the values up to the first edge, from each to the next (which is in it), and beyond the last.

    An edge given twice is a value of many rows, with a cell of its own.
    """
    if not digest.count:
        return np.zeros(len(edges) + 1)
    first_of_two = np.append(edges[1:] == edges[:-1], False)[: len(edges)]
    up_to = [digest.below(x) if first else digest.at_most(x) for x, first in zip(edges, first_of_two, strict=True)]
    # Neighbouring floats as edges, such as 0 and 5e-324, have ranks that the digest does not separate.
    return np.diff(np.maximum.accumulate([0.0, *np.minimum(up_to, 1.0), 1.0])).round(DIGITS)


def id_statistics(schema: Schema, encoders: Encoders, statistics: Statistics, name: str) -> dict[str, Any]:
    """An id feature's missing share, list length, vocabulary coverage and most frequent values (see `card`)."""
    counted, missing = name in statistics.values, statistics.missing[name]
    elements = int(statistics.values[name]["count"].sum() if counted else statistics.groups[name].sum())
    found: dict[str, Any] = {"missing": share(missing, statistics.rows)}
    if name in schema.lists:
        found["length"] = share(elements, statistics.rows - missing)
    if markers := statistics.marker_counts(name):
        found["markers"] = markers
    if not counted:
        return found | {"groups": shares_of(statistics.groups[name], elements).tolist()}
    counts = value_counts(schema, encoders, statistics, name)
    top, rest = counts.head(TOP), counts.slice(TOP)
    return found | {
        "vocabulary": len(encoders.vocabularies[schema.table_of(name)]),
        "seen": int(counts["known"].sum()),
        "distinct": counts.height,
        "unknown": share(total(counts, ~pl.col("known")), elements),
        "top": [[value, share(count, elements)] for value, count in top.select("value", "count").iter_rows()],
        "other_known": share(total(rest, pl.col("known")), elements) or 0.0,
        "other_unknown": share(total(rest, ~pl.col("known")), elements) or 0.0,
    }


def task_statistics(schema: Schema, statistics: Statistics) -> dict[str, Any]:
    """Per task its kind, observed share, mean and standard deviation."""
    sums, found = statistics.labels, {}
    for index, (name, task) in enumerate(schema.tasks.items()):
        count, total, square = (
            float(np.atleast_2d(x)[index, index]) if x.ndim else 0.0
            for x in (sums.count_TT, sums.sum_TT, sums.square_TT)
        )
        mean = share(total, count)
        std = None if mean is None else max(square / count - mean**2, 0.0) ** 0.5
        found[name] = {"kind": task.kind, "observed": share(count, statistics.rows), "mean": mean, "std": std}
    return found


def split_statistics(counts: Mapping[str, FeatureCounts]) -> dict[str, dict[str, float | None]]:
    """Per feature of a split: missing (share of rows), unknown (share of values) with a vocabulary, mean of numbers."""
    found: dict[str, dict[str, float | None]] = {}
    for name, count in counts.items():
        found[name] = {"missing": share(count.missing, count.rows)}
        if count.unknown is not None:
            found[name]["unknown"] = share(count.unknown, count.values)
        if count.total is not None:
            mean = share(count.total, count.values)
            found[name]["mean"] = None if mean is None or not math.isfinite(mean) else rounded(mean)
    return found


def value_counts(schema: Schema, encoders: Encoders, statistics: Statistics, name: str) -> pl.DataFrame:
    """The frame (value, count, known) of a feature with a vocabulary, the most frequent first."""
    vocabulary = pl.Series(encoders.vocabularies[schema.table_of(name)], dtype=pl.String)
    counts = statistics.values[name].with_columns(known=pl.col("value").is_in(vocabulary.implode()))
    return counts.sort("count", "value", descending=[True, False])


def total(counts: pl.DataFrame, which: pl.Expr) -> int:
    """Rows of a frame (value, count, known) that a condition selects."""
    return int(counts.filter(which)["count"].sum())


def shares_of(counts: np.ndarray, total: float) -> np.ndarray:
    """Counts over their total; zeros where there are none."""
    return counts / total if total else np.zeros(len(counts))


def share(part: float, whole: float) -> float | None:
    """A part of a whole, None of nothing."""
    return part / whole if whole else None


def rounded(number: float) -> float:
    """A number rounded to the precision of a digest."""
    return float(f"{number:.{DIGITS}g}")


def or_none(number: float) -> float | None:
    """A rounded number, None for NaN."""
    return None if np.isnan(number) else rounded(number)
