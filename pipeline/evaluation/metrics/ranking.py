"""Ranking metrics of a binary task in every slice of a dimension and without every bucket, from one sort of its rows.

AUC is a sum over pairs of a positive and a negative row. Without a bucket it is the sum of all pairs less those of its
positives, less those of its negatives, plus those of both: exact, for three running sums over the sorted rows.
"""

# Shapes: N rows, S slices of a dimension, K buckets, G groups of equal predictions, E edges of bins.

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.evaluation.metrics.base import Figure
from pipeline.evaluation.metrics.intervals import standard_error

BINS = 20  # of ECE and of the reliability curve


@dataclass(frozen=True)
class SortedRows:
    """Rows of a binary task by ascending logit. A soft label y is a positive row of weight y·w and a negative of (1 - y)·w.

    Attributes:
        tie_N: number of the distinct logit. predicted_N: probability times weight. bucket_N: 0 .. K - 1.
    """

    tie_N: np.ndarray
    positive_N: np.ndarray
    negative_N: np.ndarray
    predicted_N: np.ndarray
    bucket_N: np.ndarray

    def take(self, index_N: np.ndarray) -> "SortedRows":
        """Some of the rows, in the order of `index_N`."""
        return SortedRows(*(getattr(self, name)[index_N] for name in self.__dataclass_fields__))


class SliceRanking:
    """Ranking figures of the slices of one dimension.

    Args:
        rows: sorted. slice_N: of each row, 0 .. S - 1, or -1 for none. slices: S. buckets: K.
    """

    def __init__(self, rows: SortedRows, slice_N: np.ndarray | None, slices: int, buckets: int) -> None:
        self.slices, self.buckets = slices, buckets
        if slice_N is None:
            self.slice_N, self.rows = np.zeros(len(rows.tie_N), np.int64), rows
        else:
            order = np.argsort(slice_N, kind="stable")[np.count_nonzero(slice_N < 0) :]
            self.slice_N, self.rows = slice_N[order].astype(np.int64), rows.take(order)
        self.runs = _Runs(self.rows, self.slice_N, slices)

    @cached_property
    def cell_N(self) -> np.ndarray:  # noqa: N802
        """Of each row its place in (S, K)."""
        return self.slice_N * self.buckets + self.rows.bucket_N

    def by_bucket(self, value_N: np.ndarray) -> np.ndarray:
        """Sums of a value by slice and bucket, (S, K)."""
        cells = self.slices * self.buckets
        return np.bincount(self.cell_N, value_N, cells).reshape(self.slices, self.buckets)

    def auc(self) -> Figure:
        """Probability that a positive outranks a negative, a tie counted half; not binned."""
        runs, rows = self.runs, self.rows
        of_positives_SK = self.by_bucket(rows.positive_N * runs.below(runs.negative_G, self.slice_N))
        positive_SK, negative_SK = self.by_bucket(rows.positive_N), self.by_bucket(rows.negative_N)
        positive_S, negative_S, won_S = (x.sum(1) for x in (positive_SK, negative_SK, of_positives_SK))
        value_S = _ratio(won_S, positive_S * negative_S)
        if self.buckets == 1:
            return Figure(value_S)
        of_negatives_SK = self.by_bucket(rows.negative_N * runs.above(runs.positive_G, self.slice_N))
        left_SK = won_S[:, None] - of_positives_SK - of_negatives_SK + self._within()
        pairs_SK = (positive_S[:, None] - positive_SK) * (negative_S[:, None] - negative_SK)
        # What rounding leaves of a class that is in one bucket only is no class.
        pairs_SK[pairs_SK <= 1e-12 * (positive_S * negative_S)[:, None]] = 0
        return Figure(value_S, np.where(positive_SK + negative_SK > 0, _ratio(left_SK, pairs_SK), np.nan))

    def _within(self) -> np.ndarray:
        """Weight of the pairs in order that lie within one bucket, (S, K)."""
        order = np.argsort(self.cell_N.astype(_smallest(self.slices * self.buckets)), kind="stable")
        rows, cell_N = self.rows.take(order), self.cell_N[order]
        runs = _Runs(rows, cell_N, self.slices * self.buckets)
        won_N = rows.positive_N * runs.below(runs.negative_G, cell_N)
        return np.bincount(cell_N, won_N, self.slices * self.buckets).reshape(self.slices, self.buckets)

    def pr_auc(self) -> Figure:
        """Average precision (Boyd et al. 2013): mean over positives of the precision among all that rank at least as high.

        Ties share one precision. Without a bucket it is of first order in its weight (infinitesimal jackknife).
        """
        runs, rows = self.runs, self.rows
        positive_S = self.by_bucket(rows.positive_N).sum(1)
        above_G = runs.from_top(runs.positive_G)
        total_G = above_G + runs.from_top(runs.negative_G)
        precision_G = above_G / np.where(total_G > 0, total_G, 1)
        gained_G = runs.positive_G * precision_G
        value_S = _ratio(np.bincount(runs.slice_G, gained_G, self.slices), positive_S)
        if self.buckets == 1:
            return Figure(value_S)
        # A row changes the precision of its own prediction and of all below it.
        slope_G = runs.positive_G / np.where(total_G > 0, total_G, 1)
        fall_G = runs.to_here(slope_G * precision_G)
        rise_G = runs.to_here(slope_G) - fall_G
        of_row_N = rows.positive_N * runs.rows_of(precision_G + rise_G) - rows.negative_N * runs.rows_of(fall_G)
        positive_SK, left_SK = self.by_bucket(rows.positive_N), self.by_bucket(of_row_N)
        gained_S1 = (value_S * positive_S)[:, None]
        return Figure(value_S, self._known(_ratio(gained_S1 - left_SK, positive_S[:, None] - positive_SK)))

    def ece(self) -> Figure:
        """Expected calibration error (Naeini et al. 2015) over 20 bins of equal weight.

        Bins of equal width would hold nearly all rows of a rare label in the first. Equal predictions that straddle an edge
        are divided in proportion, so the order of rows cannot matter. Biased upwards on few rows, like every binned ECE.
        Without a bucket the edges stay where they are.
        """
        runs = self.runs
        excess_SE = np.diff(runs.at_edges(runs.predicted_G - runs.positive_G, BINS), axis=1)
        weight_S = runs.weight_S
        value_S = _ratio(np.abs(excess_SE).sum(1), weight_S)
        if self.buckets == 1:
            return Figure(value_S)
        bin_N, rows = self.runs.bins(BINS), self.rows
        cells = self.slices * self.buckets * BINS
        excess = np.bincount(self.cell_N * BINS + bin_N, rows.predicted_N - rows.positive_N, cells)
        excess_SKE = excess.reshape(self.slices, self.buckets, BINS)
        left_SK = np.abs(excess_SKE.sum(1, keepdims=True) - excess_SKE).sum(2)
        weight_SK = self.by_bucket(rows.positive_N + rows.negative_N)
        left_SK = _ratio(left_SK, weight_S[:, None] - weight_SK)
        centre_S = _ratio(np.abs(excess_SKE.sum(1)).sum(1), weight_S)  # a tie on an edge is in one bin here
        return Figure(value_S, self._known(left_SK + (value_S - centre_S)[:, None]))

    def reliability(self) -> list[list[float | None]]:
        """Of all rows: mean prediction, mean label, its standard error and the weight of each of 20 bins of equal weight."""
        runs, bin_N = self.runs, self.runs.bins(BINS)
        if not len(bin_N):
            return []
        weight_E, predicted_E, positive_E = (
            np.diff(runs.at_edges(x_G, BINS))[0]
            for x_G in (runs.positive_G + runs.negative_G, runs.predicted_G, runs.positive_G)
        )
        cell_N, cells = bin_N * self.buckets + self.rows.bucket_N, BINS * self.buckets
        weight_EK, label_EK = (
            np.bincount(cell_N, x_N, cells).reshape(BINS, self.buckets)
            for x_N in (self.rows.positive_N + self.rows.negative_N, self.rows.positive_N)
        )
        left_EK = _ratio(label_EK.sum(1)[:, None] - label_EK, weight_EK.sum(1)[:, None] - weight_EK)
        error_E = standard_error(np.where(weight_EK > 0, left_EK, np.nan))
        columns = (predicted_E / weight_E, positive_E / weight_E, error_E, weight_E)
        return [[float(x) if np.isfinite(x) else None for x in line] for line in zip(*columns, strict=True)]

    def _known(self, left_SK: np.ndarray) -> np.ndarray:
        """NaN for a bucket without rows of the slice."""
        return np.where(self.by_bucket(self.rows.positive_N + self.rows.negative_N) > 0, left_SK, np.nan)


class _Runs:
    """Runs of equal predictions in one slice, of rows that are sorted by slice and prediction; running sums over them.

    Attributes:
        positive_G, negative_G, predicted_G: sums of the rows. slice_G: their slice. weight_S: of the slices.
    """

    def __init__(self, rows: SortedRows, slice_N: np.ndarray, slices: int) -> None:
        changed_N = np.ones(len(slice_N), bool)
        changed_N[1:] = (rows.tie_N[1:] != rows.tie_N[:-1]) | (slice_N[1:] != slice_N[:-1])
        self.start_G = np.flatnonzero(changed_N)
        self.lengths = np.diff(self.start_G, append=len(slice_N))
        self.alone = len(self.start_G) == len(slice_N)  # no two rows are in one run
        self.slice_G = slice_N[self.start_G]
        # Of each slice the first run, and the one behind its last.
        self.first_S, self.end_S = (
            np.searchsorted(self.slice_G, np.arange(slices), side) for side in ("left", "right")
        )
        self.positive_G, self.negative_G, self.predicted_G = (
            self._sums(x_N) for x_N in (rows.positive_N, rows.negative_N, rows.predicted_N)
        )
        self.weight_before = _before(self.positive_G + self.negative_G)
        self.weight_S = self.weight_before[self.end_S] - self.weight_before[self.first_S]

    def _sums(self, value_N: np.ndarray) -> np.ndarray:
        return value_N if self.alone or not len(value_N) else np.add.reduceat(value_N, self.start_G)

    def rows_of(self, value_G: np.ndarray) -> np.ndarray:
        """The value of each row's run."""
        return value_G if self.alone else np.repeat(value_G, self.lengths)

    def below(self, value_G: np.ndarray, slice_N: np.ndarray) -> np.ndarray:
        """Of each row the sum over lower predictions of its slice, and half of its own prediction's."""
        before = _before(value_G)
        middle_G = (before[:-1] + before[1:]) / 2
        return self.rows_of(middle_G) - before[self.first_S][slice_N]

    def above(self, value_G: np.ndarray, slice_N: np.ndarray) -> np.ndarray:
        """Of each row the sum over higher predictions of its slice, and half of its own prediction's."""
        before = _before(value_G)
        middle_G = (before[:-1] + before[1:]) / 2
        return before[self.end_S][slice_N] - self.rows_of(middle_G)

    def from_top(self, value_G: np.ndarray) -> np.ndarray:
        """Of each run the sum over those of its slice that are not lower."""
        before = _before(value_G)
        return before[self.end_S][self.slice_G] - before[:-1]

    def to_here(self, value_G: np.ndarray) -> np.ndarray:
        """Of each run the sum over those of its slice that are not higher."""
        before = _before(value_G)
        return before[1:] - before[self.first_S][self.slice_G]

    def at_edges(self, value_G: np.ndarray, bins: int) -> np.ndarray:
        """The running sum of each slice at the edges of bins of equal weight, (S, bins + 1); linear within a run."""
        before = _before(value_G)
        start_S = self.weight_before[self.first_S]
        edge_SE = start_S[:, None] + self.weight_S[:, None] * np.linspace(0, 1, bins + 1)
        edge_SE[:, -1] = self.weight_before[self.end_S]
        return np.interp(edge_SE, self.weight_before, before)

    def bins(self, bins: int) -> np.ndarray:
        """Of each row the bin of equal weight that the middle of its run lies in."""
        middle_G = (self.weight_before[:-1] + self.weight_before[1:]) / 2 - self.weight_before[self.first_S][
            self.slice_G
        ]
        share_G = middle_G / np.maximum(self.weight_S[self.slice_G], 1e-300)
        return self.rows_of(np.minimum((share_G * bins).astype(np.int64), bins - 1))


def _before(value_G: np.ndarray) -> np.ndarray:
    """Running sums, (G + 1,): of what is before each run, and of all."""
    return np.concatenate(([0.0], np.cumsum(value_G)))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise, NaN where the denominator is 0."""
    return np.divide(
        numerator, denominator, out=np.full(np.broadcast(numerator, denominator).shape, np.nan), where=denominator > 0
    )


def _smallest(count: int) -> type[np.unsignedinteger]:
    """An integer type for numbers below `count`; 16 bits and fewer are sorted by radix."""
    return np.uint16 if count <= 1 << 16 else np.uint32
