"""Ranking metrics of a binary task in every slice of a dimension, and without every bucket, from counts instead of sorts.

The rows are sorted once, for all of a task's slices. Each gets the number of its bin: of its distinct logit, or, past 2^11 of
these, of bins of weight that are finer towards the top. AUC of a slice is then off by at most half the pairs that share a bin;
a slice where that is above 0.001, since its predictions lie close together, is sorted by itself. What a bucket takes from a
figure is found row by row from the bins, as for all rows (pipeline.evaluation.metrics.ranking); pairs within one bucket, which
are few, are found from 32 coarser bins.
"""

# Shapes: N rows, R rows of one class, 2 classes, S slices, K buckets, M bins, C coarse bins, E bins of ECE.

import math
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.metrics.intervals import left_out
from pipeline.evaluation.metrics.ranking import BINS, RankedRows, auc, ece, pr_auc, ratio, remaining
from pipeline.evaluation.metrics.running_sums import before, running, running_down

MAX_BINS = 1 << 11
TOP = 16  # half of the bins are of this part of the rows, the highest
COARSE_BINS = 32
MAX_SHARED = 1e-3  # half the pairs of a slice that share a bin

Figures = dict[str, tuple[np.ndarray, np.ndarray]]  # name → values (S,), and those without each bucket (S, K)


@dataclass(frozen=True)
class BinnedRows:
    """Rows of a binary task in the order of the split. A row with a soft label is there twice, as a negative and a positive.

    Attributes:
        place_R: of the row in the split. weight_R: of its class in the row. excess_R: predicted less observed, weighted.
        fine_R: the bin, by ascending logit; of a positive M more. bins: M. predicted_M: mean predicted probability of a bin.
        bucket_R: of the row. coarse_R: bucket · C + coarse bin; of a positive K · C more.
        ranked: the rows by ascending logit. order_N: where each of them is in the split.
    """

    place_R: np.ndarray | slice
    weight_R: np.ndarray
    excess_R: np.ndarray
    fine_R: np.ndarray
    bins: int
    predicted_M: np.ndarray
    bucket_R: np.ndarray
    coarse_R: np.ndarray
    ranked: RankedRows
    order_N: np.ndarray


def binned(rows: RankedRows, order_N: np.ndarray, count: int) -> BinnedRows:
    """Sorted rows as bins, in the order that they had.

    Args:
        order_N: where each sorted row was. count: of rows there, those that are not among the sorted ones included.
    """
    sorted_bin_N = _bins(rows)
    bins = int(sorted_bin_N[-1]) + 1 if len(sorted_bin_N) else 1
    weight_M = np.bincount(sorted_bin_N, rows.positive_N + rows.negative_N, bins)
    middle_M = (running(weight_M) - weight_M / 2) * (COARSE_BINS / max(weight_M.sum(), 1e-300))
    coarse_M = middle_M.clip(0, COARSE_BINS - 1).astype(np.int64)
    predicted_M = np.nan_to_num(ratio(np.bincount(sorted_bin_N, rows.predicted_N, bins), weight_M))

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
    bin_R, bucket_R = bin_N[place_R], bucket_N[place_R]
    coarse_R = (is_positive_R * rows.buckets + bucket_R) * COARSE_BINS + coarse_M[bin_R]
    fine_R, excess_R = is_positive_R * bins + bin_R, weight_R * (predicted_M[bin_R] - is_positive_R)
    return BinnedRows(place_R, weight_R, excess_R, fine_R, bins, predicted_M, bucket_R, coarse_R, rows, order_N)


def _bins(rows: RankedRows) -> np.ndarray:
    """Of each sorted row its bin: of its logit where these are few.

    Else half of the bins are of equal weight over all rows, half over the highest 16th, where a rare label decides PR-AUC.
    """
    if len(rows.start_G) <= MAX_BINS:
        return rows.tie_N
    below_G = (rows.weight_before[:-1] + rows.weight_before[1:]) / (2 * max(rows.weight_before[-1], 1e-300))
    place_G = (below_G + np.maximum(1 - (1 - below_G) * TOP, 0)) / 2
    return rows.rows_of(np.minimum(place_G * MAX_BINS, MAX_BINS - 1).astype(np.int64))


def figures_of_slices(rows: BinnedRows, slice_N: np.ndarray, slices: int) -> Figures:
    """auc, pr_auc and ece of the slices of a dimension.

    Args:
        slice_N: of the rows in the order of the split, 0 .. slices - 1, or -1 for none.
    """
    counts = SliceCounts.of(rows, slice_N, slices)
    found = {"auc": counts.auc(), "pr_auc": counts.pr_auc(), "ece": counts.ece()}
    ranked = rows.ranked
    if rows.bins < len(ranked.start_G):
        sorted_slice_N = slice_N[rows.order_N]
        for s in np.flatnonzero(counts.shared_S > MAX_SHARED):
            alone = ranked.only(np.flatnonzero(sorted_slice_N == s))
            for name, metric in (("auc", auc), ("pr_auc", pr_auc), ("ece", ece)):
                found[name][0][s], found[name][1][s] = metric(alone)
    return found


@dataclass(frozen=True)
class SliceCounts:
    """Rows of the slices of a dimension, and their weights by bin.

    Attributes:
        weight_R, excess_R: of the rows that are in a slice. cell_R: place of their slice, class and bin in a table S x 2 x M.
        part_R: place of their slice and bucket in a table S x K.
        negative_SM, positive_SM: weights of the classes by bin. negative_SKC, positive_SKC: by bucket and coarse bin.
        predicted_M: as in `BinnedRows`.
    """

    weight_R: np.ndarray
    excess_R: np.ndarray
    cell_R: np.ndarray
    part_R: np.ndarray
    negative_SM: np.ndarray
    positive_SM: np.ndarray
    negative_SKC: np.ndarray
    positive_SKC: np.ndarray
    predicted_M: np.ndarray

    @classmethod
    def of(cls, rows: BinnedRows, slice_N: np.ndarray, slices: int) -> "SliceCounts":
        """Counts the rows. Args: as of `figures_of_slices`."""
        slice_R = slice_N[rows.place_R]
        columns = [rows.weight_R, rows.excess_R, rows.fine_R, rows.coarse_R, rows.bucket_R]
        in_slice = np.flatnonzero(slice_R >= 0)
        if len(in_slice) < len(slice_R):
            slice_R, *columns = (x_R[in_slice] for x_R in (slice_R, *columns))
        weight_R, excess_R, fine_R, coarse_R, bucket_R = columns
        slice_R, buckets = slice_R.astype(np.int64), rows.ranked.buckets

        def counted(place_R: np.ndarray, *shape: int) -> tuple[np.ndarray, np.ndarray]:
            cell_R = slice_R * math.prod(shape) + place_R
            return cell_R, np.bincount(cell_R, weight_R, slices * math.prod(shape)).reshape(slices, *shape)

        cell_R, fine_S2M = counted(fine_R, 2, rows.bins)
        _, coarse_S2KC = counted(coarse_R, 2, buckets, COARSE_BINS)
        part_R = slice_R * buckets + bucket_R
        return cls(
            weight_R, excess_R, cell_R, part_R, fine_S2M[:, 0], fine_S2M[:, 1], coarse_S2KC[:, 0], coarse_S2KC[:, 1],
            rows.predicted_M,
        )  # fmt: skip

    @property
    def negative_S1(self) -> np.ndarray:  # noqa: N802
        """Weight of the negatives."""
        return self.negative_SM.sum(1, keepdims=True)

    @property
    def positive_S1(self) -> np.ndarray:  # noqa: N802
        """Weight of the positives."""
        return self.positive_SM.sum(1, keepdims=True)

    @property
    def shared_S(self) -> np.ndarray:  # noqa: N802
        """Half the share of the pairs that have one bin: AUC is at most that far off."""
        pairs_S = (self.negative_S1 * self.positive_S1)[:, 0]
        return np.nan_to_num(ratio((self.negative_SM * self.positive_SM).sum(1) / 2, pairs_S))

    def auc(self) -> tuple[np.ndarray, np.ndarray]:
        """See `ranking.auc`."""
        below_SM = running(self.negative_SM) - self.negative_SM / 2
        above_SM = self.positive_S1 - running(self.positive_SM) + self.positive_SM / 2
        won_S1 = (self.positive_SM * below_SM).sum(1, keepdims=True)
        within_SK = (self.positive_SKC * (running(self.negative_SKC) - self.negative_SKC / 2)).sum(2)
        left_SK = won_S1 - self._by_bucket(above_SM, below_SM) + within_SK
        pairs_SK = remaining(self.negative_S1, self.negative_SKC.sum(2)) * remaining(
            self.positive_S1, self.positive_SKC.sum(2)
        )
        return self._figure(ratio(won_S1, self.negative_S1 * self.positive_S1), ratio(left_SK, pairs_SK))

    def pr_auc(self) -> tuple[np.ndarray, np.ndarray]:
        """See `ranking.pr_auc`."""
        above_SM, total_SM = running_down(self.positive_SM), running_down(self.positive_SM + self.negative_SM)
        known_SM = np.where(total_SM > 0, total_SM, 1)
        precision_SM, slope_SM = above_SM / known_SM, self.positive_SM / known_SM
        gained_S1 = (self.positive_SM * precision_SM).sum(1, keepdims=True)
        fall_SM = running(slope_SM * precision_SM)
        rise_SM = running(slope_SM) - fall_SM
        left_SK = gained_S1 - self._by_bucket(-fall_SM, precision_SM + rise_SM)
        rest_SK = remaining(self.positive_S1, self.positive_SKC.sum(2))
        return self._figure(ratio(gained_S1, self.positive_S1), ratio(left_SK, rest_SK))

    def ece(self) -> tuple[np.ndarray, np.ndarray]:
        """See `ranking.ece`."""
        weight_SM = self.negative_SM + self.positive_SM
        before_S = before(weight_SM)
        weight_S1 = before_S[:, -1:]
        excess_SM = weight_SM * self.predicted_M - self.positive_SM
        value_S1 = ratio(_in_bins(before_S, excess_SM), weight_S1)
        middle_SM = (before_S[:, :-1] + weight_SM / 2) * (BINS / np.maximum(weight_S1, 1e-300))
        bin_SM = np.minimum(middle_SM, BINS - 1).astype(np.int64)
        shape = (len(weight_SM), self.positive_SKC.shape[1], BINS)
        place_R = self.part_R * BINS + self._at(bin_SM, bin_SM)
        excess_SKE = np.bincount(place_R, self.excess_R, math.prod(shape)).reshape(shape)
        sum_S1E = excess_SKE.sum(1, keepdims=True)
        rest_SK = remaining(weight_S1, (self.negative_SKC + self.positive_SKC).sum(2))
        centre_S1 = ratio(np.abs(sum_S1E).sum(2), weight_S1)  # a bin on an edge is in one bin here
        return self._figure(value_S1, ratio(np.abs(sum_S1E - excess_SKE).sum(2), rest_SK) + (value_S1 - centre_S1))

    def _at(self, of_negatives: np.ndarray, of_positives: np.ndarray) -> np.ndarray:
        """Of each row the value at its slice, class and bin, (R,). Args: (S, M)."""
        table = np.empty((len(self.negative_SM), 2, self.negative_SM.shape[1]), of_negatives.dtype)
        table[:, 0], table[:, 1] = of_negatives, of_positives
        return table.ravel()[self.cell_R]

    def _by_bucket(self, of_negatives: np.ndarray, of_positives: np.ndarray) -> np.ndarray:
        """Weighted sums over the rows of each slice and bucket, (S, K). Args: (S, M)."""
        shape = self.positive_SKC.shape[:2]
        sums = np.bincount(self.part_R, self.weight_R * self._at(of_negatives, of_positives), math.prod(shape))
        return sums.reshape(shape)

    def _figure(self, value_S1: np.ndarray, left_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known_SK = (self.positive_SKC + self.negative_SKC).sum(2) > 0
        return value_S1[:, 0], left_out(left_SK, known_SK)


def _in_bins(before_S: np.ndarray, excess_SM: np.ndarray) -> np.ndarray:
    """Absolute excess over 20 bins of equal weight, (S, 1); a bin on an edge is divided in proportion.

    Args:
        before_S: running weights, (S, M + 1). excess_SM: predicted less observed.
    """
    total_S1 = before_S[:, -1:]
    offset_S1 = 2.0 * np.arange(len(before_S))[:, None]
    # Running sums of all slices, one behind the other, so that one interpolation serves all.
    knots = (before_S / np.where(total_S1 > 0, total_S1, 1)).clip(0, 1) + offset_S1
    edges = np.linspace(0, 1, BINS + 1) + offset_S1
    at_edges = np.interp(edges.ravel(), knots.ravel(), before(excess_SM).ravel()).reshape(edges.shape)
    return np.abs(np.diff(at_edges, axis=1)).sum(1, keepdims=True)
