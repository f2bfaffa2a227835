"""Evaluated objects of tests: of given numbers, or of simulated users by float64 formulas."""

# Shapes: N rows, K buckets.

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.evaluation.metrics.evaluated import COLUMNS, Evaluated, Provenance

Left = Sequence[float | None] | np.ndarray


def line(
    task: str, metric: str, value: float | None, left_out: Left = (), of_slice: str = "all", rows: int = 1000,
    dimension: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A line of figures. The standard error is the jackknife's, written out."""
    known = [x for x in left_out if x is not None and np.isfinite(x)]
    se = None
    if len(known) > 1:
        mean, count = sum(known) / len(known), len(known)
        se = ((count - 1) / count * sum((x - mean) ** 2 for x in known)) ** 0.5
    if dimension is None:
        dimension = "all" if of_slice == "all" else of_slice.split("=")[0]
    return dict(zip(COLUMNS, (task, metric, dimension, of_slice, rows, value, se, [*left_out]), strict=True))


def evaluated(lines: Sequence[Mapping[str, Any]], run: str = "runs/a", step: int = 100, **source: Any) -> Evaluated:
    """Figures of one checkpoint."""
    buckets = max((len(x["left_out"]) for x in lines), default=1) or 1
    given = {"checkpoint": "c", "dataset": "d", "split": "test", "buckets": buckets, **source}
    return Evaluated(pl.DataFrame([*lines], schema=COLUMNS), Provenance(run=run, step=step, **given))


def around(value: float, se: float, buckets: int = 20) -> np.ndarray:
    """Values without each bucket whose jackknife standard error is `se`: half of them lower, half higher."""
    assert buckets % 2 == 0
    reach = se / (buckets - 1) ** 0.5
    return value + np.tile([-reach, reach], buckets // 2)


def ne_of(label_N: np.ndarray, p_N: np.ndarray) -> float:
    """Normalized entropy by its formula: log loss over that of the base rate."""
    loss = -np.mean(np.where(label_N == 1, np.log(p_N), np.log1p(-p_N)))
    rate = label_N.mean()
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def auc_of(label_N: np.ndarray, p_N: np.ndarray) -> float:
    """Share of pairs of a positive and a negative in the right order, by ranks; no ties."""
    rank_N = np.empty(len(p_N))
    rank_N[np.argsort(p_N)] = np.arange(1, len(p_N) + 1)
    positives = label_N.sum()
    return float((rank_N[label_N == 1].sum() - positives * (positives + 1) / 2) / positives / (len(p_N) - positives))


BINARY = {"ne": ne_of, "auc": auc_of, "calibration": lambda label_N, p_N: float(p_N.sum() / label_N.sum())}


def scored(
    task: str, label_N: np.ndarray, p_N: np.ndarray, bucket_N: np.ndarray, slices: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """A binary task's lines on all rows and on slices (name → mask), each figure computed without each bucket in turn."""
    lines = []
    buckets = int(bucket_N.max()) + 1
    for name, mask_N in {"all": np.ones(len(label_N), bool), **slices}.items():
        y_N, q_N, b_N = label_N[mask_N], p_N[mask_N], bucket_N[mask_N]
        kept = [b_N != bucket for bucket in range(buckets)]
        for metric, compute in BINARY.items():
            left_out = [compute(y_N[k_N], q_N[k_N]) for k_N in kept]
            lines.append(line(task, metric, compute(y_N, q_N), left_out, name, int(mask_N.sum())))
        lines.append(line(task, "non_finite", 0.0, [0.0] * buckets, name, int(mask_N.sum())))
    return lines
