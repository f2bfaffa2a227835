"""Confidence intervals: the delete-a-bucket jackknife (Shao and Tu 1995, section 2.3), for one model and paired for two.

Rows are put into K buckets by the hash of a cluster key, since rows of one user are not independent. A figure is computed
without each bucket in turn; how far these K values lie apart is its standard error. Two models that are scored on the same
rows share the buckets, so the standard error of their difference is that of the differences bucket by bucket.
"""

# Shapes: S slices, or any other axes, K buckets.

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import stdtrit  # scipy.stats, which has it as t.ppf, takes seconds to import


def left_out(value_SK: np.ndarray, known_SK: np.ndarray) -> np.ndarray:
    """Figures without each bucket, as `standard_error` takes them.

    Args:
        value_SK: NaN or infinite where a figure is undefined. known_SK: whether the bucket has rows of the figure.
    Returns: NaN for a bucket without rows; and for all buckets where a figure is undefined without one that has rows, such as
        the only one with a positive: most of the error comes from that one, and the others would understate it.
    """
    undefined_S1 = (known_SK & ~np.isfinite(value_SK)).any(-1, keepdims=True)
    return np.where(known_SK & ~undefined_S1, value_SK, np.nan)


def standard_error(left_out_SK: np.ndarray) -> np.ndarray:
    """Standard errors of S figures from their values without each bucket.

    Args:
        left_out_SK: NaN for a bucket that has no row of the figure; such do not count.
    Returns: SE_S, NaN with fewer than two buckets.
    """
    count_S1 = np.isfinite(left_out_SK).sum(-1, keepdims=True)
    filled_SK = np.where(np.isfinite(left_out_SK), left_out_SK, 0.0)
    mean_S1 = filled_SK.sum(-1, keepdims=True) / np.maximum(count_S1, 1)
    squares_SK = np.where(np.isfinite(left_out_SK), (left_out_SK - mean_S1) ** 2, 0.0)
    count_S = count_S1[..., 0]
    return np.where(count_S > 1, np.sqrt(squares_SK.sum(-1) * (count_S - 1) / np.maximum(count_S, 1)), np.nan)


def buckets_used(left_out_SK: np.ndarray) -> np.ndarray:
    """How many buckets of each figure have rows: its interval has one degree of freedom fewer."""
    return np.isfinite(left_out_SK).sum(-1)


def quantile(confidence: float, buckets: np.ndarray | int, sides: int = 2) -> np.ndarray:
    """How many standard errors an interval reaches: of Student's t with one degree of freedom fewer than buckets.

    Args:
        confidence: in (0, 1). sides: 2 for value ± q·SE, 1 for a bound on one side.
    Returns: of the shape of `buckets`, NaN with fewer than two.
    """
    freedom = np.asarray(buckets, np.float64) - 1
    probability = 1 - (1 - confidence) / sides
    return np.where(freedom >= 1, stdtrit(np.maximum(freedom, 1), probability), np.nan)


def reach_of(record: Mapping[str, Any], task: str, metric: str, confidence: float) -> float:
    """How many standard errors the two-sided interval of a figure reaches in a record (pipeline.run.records); NaN: it has none.

    Records of early versions do not have how many buckets have rows of the task: all of theirs are taken to.
    """
    used = (record.get("buckets_used") or {}).get(task, {}).get(metric, record.get("buckets"))
    return float(quantile(confidence, used or 0))
