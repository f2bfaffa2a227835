"""Ranking metrics of a binary task in every slice of a dimension, and without every bucket, from counts instead of sorts.

The rows are sorted once, for all of a task's slices. Each gets the number of its bin: of its distinct logit, or, past 2^12 of
these, of bins of equal weight. AUC of a slice is then off by at most half the pairs that share a bin (1.2e-4 of a slice that is
spread as the whole, and in truth far less, since the rows of a bin are ties that count half). What a bucket changes is found
from 32 coarser bins, fine towards the top, where the precision of a rare label changes.
"""

# Shapes: N rows, S slices, K buckets, M bins, C coarse bins.

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.metrics.ranking import BINS, RankedRows, ratio

MAX_BINS = 1 << 12
COARSE_BINS = 32


@dataclass(frozen=True)
class BinnedRows:
    """Rows of a binary task in the order of the split.

    Attributes:
        bin_N: by ascending logit. bins: M. coarse_M: the coarse bin of each. predicted_M, predicted_C: mean predicted
            probability of the rows of a bin, of a coarse bin.
        positive_N, negative_N, bucket_N, buckets: as in `RankedRows`.
    """

    bin_N: np.ndarray
    bins: int
    coarse_M: np.ndarray
    predicted_M: np.ndarray
    predicted_C: np.ndarray
    positive_N: np.ndarray
    negative_N: np.ndarray
    bucket_N: np.ndarray
    buckets: int


def binned(rows: RankedRows, order_N: np.ndarray, count: int) -> BinnedRows:
    """Sorted rows as bins, in the order that they had.

    Args:
        order_N: where each sorted row was. count: of rows there, those that are not among the sorted ones included.
    """
    distinct = len(rows.start_G)
    sorted_bin_N = rows.tie_N if distinct <= MAX_BINS else rows.bins(MAX_BINS)
    bins = min(distinct, MAX_BINS)
    weight_M = np.bincount(sorted_bin_N, rows.positive_N + rows.negative_N, max(bins, 1))
    above_M = (weight_M[::-1].cumsum()[::-1] - weight_M / 2) / max(weight_M.sum(), 1e-300)
    half = COARSE_BINS // 2
    # Below the median bins of equal weight, above it two for each halving of what ranks higher.
    lower_M = half * 2 * (1 - above_M)
    upper_M = half - 1 - 2 * np.log2(np.maximum(above_M * 2, 2.0 ** -(half / 2)))
    coarse_M = np.where(above_M > 0.5, lower_M, upper_M + 1).clip(0, COARSE_BINS - 1).astype(np.int32)

    predicted_M = np.bincount(sorted_bin_N, rows.predicted_N, len(weight_M))
    of_coarse = [np.bincount(coarse_M, x_M, COARSE_BINS) for x_M in (predicted_M, weight_M)]

    def back(value_N: np.ndarray) -> np.ndarray:
        placed = np.zeros(count, value_N.dtype)
        placed[order_N] = value_N
        return placed

    mean_M, mean_C = (np.nan_to_num(ratio(*sums)) for sums in ((predicted_M, weight_M), of_coarse))
    bin_N, bucket_N = (back(x_N.astype(np.int32)) for x_N in (sorted_bin_N, rows.bucket_N))
    positive_N, negative_N = back(rows.positive_N), back(rows.negative_N)
    return BinnedRows(bin_N, bins, coarse_M, mean_M, mean_C, positive_N, negative_N, bucket_N, rows.buckets)


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
        place_N = np.flatnonzero(slice_N >= 0)
        everything = len(place_N) == len(slice_N)

        def of_slices(value_N: np.ndarray) -> np.ndarray:
            return value_N if everything else value_N[place_N]

        slice_N, bin_N, bucket_N = of_slices(slice_N).astype(np.int32), of_slices(rows.bin_N), of_slices(rows.bucket_N)
        weights = [of_slices(x_N) for x_N in (rows.positive_N, rows.negative_N)]
        fine_N = slice_N * np.int32(rows.bins) + bin_N
        coarse_N = (slice_N * rows.buckets + bucket_N) * COARSE_BINS + rows.coarse_M[bin_N]
        coarse = (slices, rows.buckets, COARSE_BINS)
        positive_SM, negative_SM = (
            np.bincount(fine_N, x_N, slices * rows.bins).reshape(slices, rows.bins) for x_N in weights
        )
        positive_SKC, negative_SKC = (
            np.bincount(coarse_N, x_N, slices * rows.buckets * COARSE_BINS).reshape(coarse) for x_N in weights
        )
        return cls(positive_SM, negative_SM, positive_SKC, negative_SKC, rows.predicted_M, rows.predicted_C)

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
            found[name] = (value_S, np.where(known_SK, value_S[:, None] + moved_SK, np.nan))
        return found


# The last axis of their arguments are bins by ascending logit: weights of both classes, and the mean prediction.


def _auc(positive: np.ndarray, negative: np.ndarray, _: np.ndarray) -> np.ndarray:
    below = negative.cumsum(-1) - negative / 2
    return ratio((positive * below).sum(-1), positive.sum(-1) * negative.sum(-1))


def _pr_auc(positive: np.ndarray, negative: np.ndarray, _: np.ndarray) -> np.ndarray:
    above, more = (x[..., ::-1].cumsum(-1)[..., ::-1] for x in (positive, negative))
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
    knots = np.concatenate((np.zeros((*shape, 1)), weight.cumsum(-1)), -1) / np.where(total > 0, total, 1)[..., None]
    excess = np.concatenate((np.zeros((*shape, 1)), (predicted - positive).cumsum(-1)), -1)
    offset = 2.0 * np.arange(total.size).reshape(*shape, 1)
    edges = np.linspace(0, 1, BINS + 1) + offset
    at_edges = np.interp(edges.ravel(), (knots.clip(0, 1) + offset).ravel(), excess.ravel()).reshape(edges.shape)
    return ratio(np.abs(np.diff(at_edges, axis=-1)).sum(-1), total)
