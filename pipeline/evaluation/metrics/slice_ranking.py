"""Ranking metrics of a binary task in every slice of a dimension, and without every bucket, from counts instead of sorts.

The rows are sorted once, for all of a task's slices. Each gets the number of its bin: of its distinct logit, or, past 2^12 of
these, of bins of equal weight. AUC of a slice is then off by at most half the pairs that share a bin (1.2e-4 of a slice that is
spread as the whole, and in truth far less, since the rows of a bin are ties that count half). What a bucket changes is found
from 32 coarser bins, fine towards the top, where the precision of a rare label changes.
"""

# Shapes: N rows, R rows of one class, 2 classes, S slices, K buckets, M bins, C coarse bins.

import math
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.metrics.intervals import left_out
from pipeline.evaluation.metrics.ranking import BINS, RankedRows, ratio
from pipeline.evaluation.metrics.running_sums import before, running, running_down

MAX_BINS = 1 << 12
COARSE_BINS = 32


@dataclass(frozen=True)
class BinnedRows:
    """Rows of a binary task in the order of the split. A row with a soft label is there twice, as a negative and a positive.

    Attributes:
        place_R: of the row in the split. weight_R: of its class in the row.
        fine_R: the bin, by ascending logit; of a positive M more. bins: M.
        coarse_R: bucket · C + coarse bin; of a positive K · C more. buckets: K.
        predicted_M, predicted_C: mean predicted probability of the rows of a bin, of a coarse bin.
    """

    place_R: np.ndarray | slice
    weight_R: np.ndarray
    fine_R: np.ndarray
    bins: int
    coarse_R: np.ndarray
    buckets: int
    predicted_M: np.ndarray
    predicted_C: np.ndarray


def binned(rows: RankedRows, order_N: np.ndarray, count: int) -> BinnedRows:
    """Sorted rows as bins, in the order that they had.

    Args:
        order_N: where each sorted row was. count: of rows there, those that are not among the sorted ones included.
    """
    distinct = len(rows.start_G)
    sorted_bin_N = rows.tie_N if distinct <= MAX_BINS else rows.bins(MAX_BINS)
    bins = max(min(distinct, MAX_BINS), 1)
    weight_M = np.bincount(sorted_bin_N, rows.positive_N + rows.negative_N, bins)
    above_M = (running_down(weight_M) - weight_M / 2) / max(weight_M.sum(), 1e-300)
    half = COARSE_BINS // 2
    # Below the median bins of equal weight, above it two for each halving of what ranks higher.
    lower_M = half * 2 * (1 - above_M)
    upper_M = half - 1 - 2 * np.log2(np.maximum(above_M * 2, 2.0 ** -(half / 2)))
    coarse_M = np.where(above_M > 0.5, lower_M, upper_M + 1).clip(0, COARSE_BINS - 1).astype(np.int64)
    predicted_M = np.bincount(sorted_bin_N, rows.predicted_N, bins)
    of_coarse = [np.bincount(coarse_M, x_M, COARSE_BINS) for x_M in (predicted_M, weight_M)]
    mean_M, mean_C = (np.nan_to_num(ratio(*sums)) for sums in ((predicted_M, weight_M), of_coarse))

    def back(value_N: np.ndarray) -> np.ndarray:
        placed = np.zeros(count, value_N.dtype)
        placed[order_N] = value_N
        return placed

    bin_N, bucket_N = back(sorted_bin_N.astype(np.int64)), back(rows.bucket_N)
    negative_N, positive_N = back(rows.negative_N), back(rows.positive_N)
    place_R: np.ndarray | slice = slice(None)
    is_positive_R, weight_R = positive_N > 0, negative_N + positive_N
    if not ((negative_N > 0) ^ is_positive_R).all():
        place_R, class_R = np.nonzero(weight_N2 := np.column_stack((negative_N, positive_N)))
        is_positive_R, weight_R = class_R > 0, weight_N2[place_R, class_R]
    bin_R = bin_N[place_R]
    coarse_R = (is_positive_R * rows.buckets + bucket_N[place_R]) * COARSE_BINS + coarse_M[bin_R]
    return BinnedRows(
        place_R, weight_R, is_positive_R * bins + bin_R, bins, coarse_R, rows.buckets, mean_M, mean_C
    )  # fmt: skip


@dataclass(frozen=True)
class SliceCounts:
    """Weights of the classes in the slices of a dimension, by bin and by bucket and coarse bin; mean predictions of bins."""

    positive_SM: np.ndarray
    negative_SM: np.ndarray
    positive_SKC: np.ndarray
    negative_SKC: np.ndarray
    predicted_M: np.ndarray
    predicted_C: np.ndarray

    @classmethod
    def of(cls, rows: BinnedRows, slice_N: np.ndarray, slices: int) -> "SliceCounts":
        """Counts the rows.

        Args:
            slice_N: 0 .. slices - 1, or -1 for none.
        """
        slice_R = slice_N[rows.place_R]
        weight_R, fine_R, coarse_R = rows.weight_R, rows.fine_R, rows.coarse_R
        in_slice_R = np.flatnonzero(slice_R >= 0)
        if len(in_slice_R) < len(slice_R):
            slice_R, weight_R, fine_R, coarse_R = (x_R[in_slice_R] for x_R in (slice_R, weight_R, fine_R, coarse_R))
        slice_R = slice_R.astype(np.int64)

        def sums(cell_R: np.ndarray, *shape: int) -> np.ndarray:
            size = math.prod(shape)
            return np.bincount(slice_R * size + cell_R, weight_R, slices * size).reshape(slices, *shape)

        fine_S2M, coarse_S2KC = sums(fine_R, 2, rows.bins), sums(coarse_R, 2, rows.buckets, COARSE_BINS)
        return cls(
            fine_S2M[:, 1], fine_S2M[:, 0], coarse_S2KC[:, 1], coarse_S2KC[:, 0], rows.predicted_M, rows.predicted_C
        )  # fmt: skip

    def figures(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """auc, pr_auc and ece: the values (S,), and those without each bucket (S, K), NaN for a bucket without rows."""
        coarse_SKC = [self.positive_SKC, self.negative_SKC]
        known_SK = (self.positive_SKC + self.negative_SKC).sum(2) > 0
        sum_S1C = [x.sum(1, keepdims=True) for x in coarse_SKC]
        # Not below 0 by rounding where a class is in one bucket alone.
        left_SKC = [
            np.where(all_S1C - x < 1e-12 * all_S1C, 0, all_S1C - x)
            for all_S1C, x in zip(sum_S1C, coarse_SKC, strict=True)
        ]
        found = {}
        for name, metric in (("auc", _auc), ("pr_auc", _pr_auc), ("ece", _ece)):
            value_S = metric(self.positive_SM, self.negative_SM, self.predicted_M)
            moved_SK = metric(left_SKC[0], left_SKC[1], self.predicted_C)
            moved_SK -= metric(sum_S1C[0], sum_S1C[1], self.predicted_C)
            found[name] = (value_S, left_out(value_S[:, None] + moved_SK, known_SK))
        return found


# The last axis of their arguments are bins by ascending logit: weights of both classes, and the mean prediction.


def _auc(positive: np.ndarray, negative: np.ndarray, _: np.ndarray) -> np.ndarray:
    below = running(negative) - negative / 2
    return ratio((positive * below).sum(-1), positive.sum(-1) * negative.sum(-1))


def _pr_auc(positive: np.ndarray, negative: np.ndarray, _: np.ndarray) -> np.ndarray:
    above, more = (running_down(x) for x in (positive, negative))
    precision = above / np.where(above + more > 0, above + more, 1)
    return ratio((positive * precision).sum(-1), positive.sum(-1))


def _ece(positive: np.ndarray, negative: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Over 20 bins of equal weight; a bin on an edge is divided in proportion."""
    weight = positive + negative
    predicted = weight * predicted
    shape = weight.shape[:-1]
    # Running sums of all leading entries, one behind the other, so that one interpolation serves all.
    total = weight.sum(-1)
    if not total.size:
        return total
    knots = before(weight) / np.where(total > 0, total, 1)[..., None]
    excess = before(predicted - positive)
    offset = 2.0 * np.arange(total.size).reshape(*shape, 1)
    edges = np.linspace(0, 1, BINS + 1) + offset
    at_edges = np.interp(edges.ravel(), (knots.clip(0, 1) + offset).ravel(), excess.ravel()).reshape(edges.shape)
    return ratio(np.abs(np.diff(at_edges, axis=-1)).sum(-1), total)
