"""Ranking metrics of a binary task over all rows, exactly, and without every bucket, from one sort.

AUC is a sum over pairs of a positive and a negative row. Without a bucket it is the sum of all pairs less those of its
positives, less those of its negatives, plus those of both: exact, from running sums over the sorted rows.
"""

# Shapes: N rows, K buckets, G groups of equal predictions, I some of the rows, E bins.

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.evaluation.metrics.intervals import buckets_used, left_out, standard_error
from pipeline.evaluation.metrics.running_sums import before, running

BINS = 20  # of ECE and of the reliability curve


@dataclass(frozen=True)
class RankedRows:
    """Rows of a binary task by ascending logit. A soft label y is a positive row of weight y·w and a negative of (1 - y)·w.

    Attributes:
        tie_N: number of the distinct logit, ascending. predicted_N: probability times weight. bucket_N: 0 .. buckets - 1.
    """

    tie_N: np.ndarray
    positive_N: np.ndarray
    negative_N: np.ndarray
    predicted_N: np.ndarray
    bucket_N: np.ndarray
    buckets: int

    def only(self, place_I: np.ndarray) -> "RankedRows":
        """Some of the rows. Args: place_I: ascending."""
        columns = (self.tie_N, self.positive_N, self.negative_N, self.predicted_N, self.bucket_N)
        tie_I, positive_I, negative_I, predicted_I, bucket_I = (x_N[place_I] for x_N in columns)
        tie_I = np.cumsum(np.diff(tie_I, prepend=tie_I[:1]) > 0, dtype=np.int32)
        return RankedRows(tie_I, positive_I, negative_I, predicted_I, bucket_I, self.buckets)

    @cached_property
    def start_G(self) -> np.ndarray:  # noqa: N802
        """The first row of each distinct logit."""
        return np.flatnonzero(np.diff(self.tie_N, prepend=-1))

    def sums(self, value_N: np.ndarray) -> np.ndarray:
        """Sums over the rows of each distinct logit, (G,)."""
        return value_N if len(self.start_G) == len(value_N) else np.bincount(self.tie_N, value_N)

    def rows_of(self, value_G: np.ndarray) -> np.ndarray:
        """The value of each row's logit, (N,)."""
        return value_G if len(value_G) == len(self.tie_N) else value_G[self.tie_N]

    @cached_property
    def positive_G(self) -> np.ndarray:  # noqa: N802
        """Weight of the positive class at each distinct logit."""
        return self.sums(self.positive_N)

    @cached_property
    def negative_G(self) -> np.ndarray:  # noqa: N802
        """Weight of the negative class at each distinct logit."""
        return self.sums(self.negative_N)

    @cached_property
    def predicted_G(self) -> np.ndarray:  # noqa: N802
        """Predicted probability times weight at each distinct logit."""
        return self.sums(self.predicted_N)

    @cached_property
    def positive_before(self) -> np.ndarray:
        """Weight of the positive class at lower logits, and of all, (G + 1,)."""
        return before(self.positive_G)

    @cached_property
    def negative_before(self) -> np.ndarray:
        """Weight of the negative class at lower logits, and of all, (G + 1,)."""
        return before(self.negative_G)

    @cached_property
    def weight_before(self) -> np.ndarray:
        """Weight of lower logits, and of all, (G + 1,)."""
        return self.positive_before + self.negative_before

    def by_bucket(self, value_N: np.ndarray) -> np.ndarray:
        """Sums by bucket, (K,)."""
        return np.bincount(self.bucket_N, value_N, self.buckets)

    @cached_property
    def positive_K(self) -> np.ndarray:  # noqa: N802
        """Weight of the positive class by bucket."""
        return self.by_bucket(self.positive_N)

    @cached_property
    def negative_K(self) -> np.ndarray:  # noqa: N802
        """Weight of the negative class by bucket."""
        return self.by_bucket(self.negative_N)

    @property
    def known_K(self) -> np.ndarray:  # noqa: N802
        """Buckets that have rows."""
        return self.positive_K + self.negative_K > 0

    @cached_property
    def calibration_bin_N(self) -> np.ndarray:  # noqa: N802
        """Of each row its bin of ECE and of the reliability curve."""
        return self.bins(BINS)

    def bins(self, bins: int) -> np.ndarray:
        """Of each row the bin of equal weight that the middle of its logit's weight lies in."""
        edges = self.weight_before
        middle_G = (edges[:-1] + edges[1:]) / 2
        return self.rows_of(np.minimum(middle_G * (bins / max(edges[-1], 1e-300)), bins - 1).astype(np.int64))


def auc(rows: RankedRows) -> tuple[float, np.ndarray]:
    """Probability that a positive outranks a negative, a tie counted half; not binned. The value, and without each bucket."""
    positive, negative = rows.positive_K.sum(), rows.negative_K.sum()
    won_K = rows.by_bucket(rows.positive_N * rows.rows_of(rows.negative_before[:-1] + rows.negative_G / 2))
    won = won_K.sum()
    if rows.buckets == 1:
        return float(ratio(won, positive * negative)), np.full(1, np.nan)
    lost_K = rows.by_bucket(rows.negative_N * rows.rows_of(positive - rows.positive_before[:-1] - rows.positive_G / 2))
    pairs_K = remaining(positive, rows.positive_K) * remaining(negative, rows.negative_K)
    left_K = ratio(won - won_K - lost_K + _won_within(rows), pairs_K)
    return float(ratio(won, positive * negative)), left_out(left_K, rows.known_K)


def _won_within(rows: RankedRows) -> np.ndarray:
    """Weight of the pairs in order that lie within one bucket, (K,)."""
    order = np.argsort(rows.bucket_N.astype(np.uint16), kind="stable")
    bucket_N, positive_N, negative_N = (x_N[order] for x_N in (rows.bucket_N, rows.positive_N, rows.negative_N))
    before_N = running(negative_N)
    before_N -= negative_N
    # Running sums go on over buckets; what they were at the first row of its bucket is taken off.
    first_K = np.minimum(np.searchsorted(bucket_N, np.arange(rows.buckets)), max(len(order) - 1, 0))
    start_K = before_N[first_K] if len(order) else np.zeros(rows.buckets)
    if len(rows.start_G) < len(order):  # ties, of which only those of one bucket are in one piece here
        tie_N = rows.tie_N[order]
        goes_on_N = (np.diff(tie_N, prepend=-1) == 0) & (np.diff(bucket_N, prepend=-1) == 0)
        tied_I = np.flatnonzero(goes_on_N | np.append(goes_on_N[1:], False))
        start = tied_I[~goes_on_N[tied_I]]
        run_I = np.cumsum(~goes_on_N[tied_I]) - 1
        before_N[tied_I] = before_N[start][run_I]
        negative_N[tied_I] = np.bincount(run_I, negative_N[tied_I])[run_I]
    before_N += negative_N / 2
    before_N -= start_K[bucket_N]
    before_N *= positive_N
    return np.bincount(bucket_N, before_N, rows.buckets)


def pr_auc(rows: RankedRows) -> tuple[float, np.ndarray]:
    """Average precision (Boyd et al. 2013): mean over positives of the precision among all that rank at least as high.

    Ties share one precision. Without a bucket it is of first order in its weight (infinitesimal jackknife).
    """
    positive = rows.positive_K.sum()
    above_G = positive - rows.positive_before[:-1]
    total_G = rows.weight_before[-1] - rows.weight_before[:-1]
    # Of the highest logits rounding may leave nothing of a difference of large sums.
    above_G, total_G = np.maximum(above_G, rows.positive_G), np.maximum(total_G, rows.positive_G + rows.negative_G)
    precision_G = above_G / np.where(total_G > 0, total_G, 1)
    gained = float(rows.positive_G @ precision_G)
    if rows.buckets == 1:
        return float(ratio(gained, positive)), np.full(1, np.nan)
    # A row changes the precision of its own logit and of all below it.
    slope_G = rows.positive_G / np.where(total_G > 0, total_G, 1)
    fall_G = running(slope_G * precision_G)
    rise_G = running(slope_G) - fall_G
    of_row_N = rows.positive_N * rows.rows_of(precision_G + rise_G) - rows.negative_N * rows.rows_of(fall_G)
    left_K = ratio(gained - rows.by_bucket(of_row_N), remaining(positive, rows.positive_K))
    return float(ratio(gained, positive)), left_out(left_K, rows.known_K)


def ece(rows: RankedRows) -> tuple[float, np.ndarray]:
    """Expected calibration error (Naeini et al. 2015) over 20 bins of equal weight.

    Bins of equal width would hold nearly all rows of a rare label in the first. Equal predictions that straddle an edge are
    divided in proportion, so the order of rows cannot matter. Biased upwards on few rows, like every binned ECE: an interval is
    around its mean on as many rows. Where bins are calibrated the standard error is up to 1.7 times too large, since the
    jackknife sees the slope of an absolute value, not its fold at 0. Without a bucket the edges stay where they are.
    """
    weight = rows.weight_before[-1]
    value = float(ratio(np.abs(_in_bins(rows, rows.predicted_G - rows.positive_G)).sum(), weight))
    if rows.buckets == 1:
        return value, np.full(1, np.nan)
    cell_N = rows.bucket_N * BINS + rows.calibration_bin_N
    excess = np.bincount(cell_N, rows.predicted_N - rows.positive_N, rows.buckets * BINS).reshape(rows.buckets, BINS)
    rest_K = remaining(weight, rows.positive_K + rows.negative_K)
    left_K = ratio(np.abs(excess.sum(0) - excess).sum(1), rest_K)
    centre = ratio(np.abs(excess.sum(0)).sum(), weight)  # a tie on an edge is in one bin here
    return value, left_out(left_K + (value - centre), rows.known_K)


def reliability(rows: RankedRows) -> list[list[float | None]]:
    """Mean prediction, mean label, its standard error, weight and buckets with rows of each of 20 bins of equal weight.

    Returns: [] without rows.
    """
    if not len(rows.tie_N):
        return []
    weight_E, predicted_E, positive_E = (
        _in_bins(rows, x_G) for x_G in (rows.positive_G + rows.negative_G, rows.predicted_G, rows.positive_G)
    )
    cell_N, cells = rows.calibration_bin_N * rows.buckets + rows.bucket_N, BINS * rows.buckets
    weight_EK, label_EK = (
        np.bincount(cell_N, x_N, cells).reshape(BINS, rows.buckets)
        for x_N in (rows.positive_N + rows.negative_N, rows.positive_N)
    )
    left_EK = ratio(label_EK.sum(1)[:, None] - label_EK, weight_EK.sum(1)[:, None] - weight_EK)
    left_EK = left_out(left_EK, weight_EK > 0)
    columns = (
        predicted_E / weight_E, positive_E / weight_E, standard_error(left_EK), weight_E, buckets_used(left_EK)
    )  # fmt: skip
    return [[float(x) if np.isfinite(x) else None for x in line] for line in zip(*columns, strict=True)]


def _in_bins(rows: RankedRows, value_G: np.ndarray) -> np.ndarray:
    """Sums over bins of equal weight, (E,); a logit on an edge is divided in proportion."""
    edge_E = np.linspace(0, rows.weight_before[-1], BINS + 1)
    return np.diff(np.interp(edge_E, rows.weight_before, before(value_G)))


def remaining(whole: np.ndarray | float, part_K: np.ndarray) -> np.ndarray:
    """Weight without each bucket; 0 where it may be what rounding leaves of a weight that is in one bucket."""
    rest_K = whole - part_K
    return np.where(rest_K <= 1e-12 * whole, 0.0, rest_K)


def ratio(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Elementwise, NaN where the denominator is not above 0."""
    shape = np.broadcast(numerator, denominator).shape
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=np.asarray(denominator) > 0)
