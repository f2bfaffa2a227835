"""Metrics of the order within groups, such as the impressions of one user, session or query: grouped AUC and NDCG@k.

Both are sums over groups divided by sums over groups, and a group is in one bucket: the values without each bucket are exact.
A group whose rows share a bucket, such as a session of one user, is in that one. One of several clusters, such as a query of
many users, is in one by its own hash: intervals then take such groups, not users, as independent of each other.
"""

# Shapes: N rows, R runs of rows of one group with equal logits, G groups, P labels above 0, K buckets, L ranks up to k.

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.metrics.base import bucket_of
from pipeline.evaluation.metrics.intervals import left_out
from pipeline.evaluation.metrics.radix import by_radix, ordered_bits
from pipeline.evaluation.metrics.running_sums import running


@dataclass(frozen=True)
class Groups:
    """The rows that count, sorted by group and within it by logit, ascending.

    Attributes:
        label_N, weight_N: of the sorted rows, float64.
        gain_P: the labels above 0, sorted by group and within it descending. gain_group_P: the group of each.
        run_R: first row of each run. group_G: first row of each group. group_run_G: first run of each group.
        bucket_G: the bucket of each group.
    """

    label_N: np.ndarray
    weight_N: np.ndarray
    gain_P: np.ndarray
    gain_group_P: np.ndarray
    run_R: np.ndarray
    group_G: np.ndarray
    group_run_G: np.ndarray
    bucket_G: np.ndarray

    def in_runs(self, value_N: np.ndarray) -> np.ndarray:
        """Sums over the rows of each run, (R,)."""
        return value_N if len(self.run_R) == len(value_N) else np.add.reduceat(value_N, self.run_R)


def grouped(
    logit_N: np.ndarray,
    label_N: np.ndarray,
    weight_N: np.ndarray,
    group_N: np.ndarray,
    bucket_N: np.ndarray,
    buckets: int,
    k: int,
) -> dict[str, tuple[float, np.ndarray]]:
    """Grouped AUC and NDCG@k of a binary task.

    Args:
        logit_N: float32 or float64. label_N: in [0, 1]. weight_N: rows of weight 0 do not count.
        group_N: int64, 64-bit hashes of the groups. bucket_N: in 0 .. buckets - 1; a group whose rows are in several is in
            one by the high 32 bits of its hash.
        k: how many places of a group's list NDCG looks at.
    Returns: `gauc` and `ndcg`: the value, NaN where undefined (no group counts, or a logit is not finite), and left_out_K, NaN
        for a bucket without a group that counts.
    """
    if not (keep_N := weight_N > 0).all():
        columns = (x_N[keep_N] for x_N in (logit_N, label_N, weight_N, group_N, bucket_N))
        logit_N, label_N, weight_N, group_N, bucket_N = columns
    if not len(logit_N) or not np.isfinite(logit_N).all():
        undefined = np.nan, np.full(buckets, np.nan)
        return {"gauc": undefined, "ndcg": undefined}
    groups = _sorted(logit_N, label_N, weight_N, group_N, bucket_N, buckets)
    return {
        "gauc": _weighted_mean(*_auc(groups), groups.bucket_G, buckets),
        "ndcg": _weighted_mean(*_ndcg(groups, k), groups.bucket_G, buckets),
    }


def _auc(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Each group's AUC and its weight in the mean: its impressions (Zhou et al., KDD 2018, Deep Interest Network).

    Impressions are the sum of the rows' weights. A pair of rows of weights v and w counts v w; equal logits count half. A soft
    label y is a positive row of weight y w and a negative one of weight (1 - y) w. A group of one class has weight 0.
    """
    positive_N = groups.weight_N * groups.label_N
    positive_R, negative_R = groups.in_runs(positive_N), groups.in_runs(groups.weight_N - positive_N)
    positive_G, negative_G = (np.add.reduceat(x_R, groups.group_run_G) for x_R in (positive_R, negative_R))
    below_R = running(negative_R) - negative_R
    below_R -= np.repeat(below_R[groups.group_run_G], np.diff(groups.group_run_G, append=len(below_R)))
    won_G = np.add.reduceat(positive_R * (below_R + negative_R / 2), groups.group_run_G)
    pairs_G = positive_G * negative_G
    auc_G = np.divide(won_G, pairs_G, out=np.zeros_like(won_G), where=pairs_G > 0)
    return auc_G, np.where(pairs_G > 0, positive_G + negative_G, 0.0)


def _ndcg(groups: Groups, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each group's NDCG@k (Järvelin and Kekäläinen 2002) and its weight in the mean: the mean weight of its rows.

    The gain of a row is its label, its discount log2(1 + rank). Rows of equal logits share their ranks, each with the mean gain
    (McSherry and Najork, ECIR 2008), so the order of rows cannot matter. A row fills one place of the list
    whatever it weighs; with rows of equal weight the mean over groups is the plain one. Groups without a gain have weight 0.
    """
    rows = len(groups.label_N)
    size_G = np.diff(groups.group_G, append=rows)
    end_N = np.repeat(groups.group_G + size_G, size_G)
    rank_N = end_N - np.arange(rows)  # the last of a group has the highest logit
    discount_L = np.append(1 / np.log2(np.arange(2, min(k, int(size_G.max())) + 2)), 0.0)
    discount_N = discount_L[np.minimum(rank_N, len(discount_L)) - 1]
    length_R = np.diff(groups.run_R, append=rows)
    gain_R, discount_R = groups.in_runs(groups.label_N), groups.in_runs(discount_N)
    dcg_G = np.add.reduceat(gain_R * discount_R / length_R, groups.group_run_G)
    gains_G = np.bincount(groups.gain_group_P, minlength=len(size_G))
    ideal_rank_P = np.arange(len(groups.gain_P)) - np.repeat(gains_G.cumsum() - gains_G, gains_G)
    ideal_P = groups.gain_P * discount_L[np.minimum(ideal_rank_P, len(discount_L) - 1)]
    ideal_G = np.bincount(groups.gain_group_P, ideal_P, len(size_G))
    ndcg_G = np.divide(dcg_G, ideal_G, out=np.zeros_like(dcg_G), where=ideal_G > 0)
    mean_weight_G = np.add.reduceat(groups.weight_N, groups.group_G) / size_G
    return ndcg_G, np.where(ideal_G > 0, mean_weight_G, 0.0)


def _weighted_mean(
    value_G: np.ndarray, weight_G: np.ndarray, bucket_G: np.ndarray, buckets: int
) -> tuple[float, np.ndarray]:
    """The mean over groups and, exactly, that without each bucket; NaN for one whose groups have no weight."""
    sum_K, weight_K = (np.bincount(bucket_G, x_G, buckets) for x_G in (value_G * weight_G, weight_G))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(np.float64(sum_K.sum()) / weight_K.sum())
        left_out_K = _without_each(sum_K) / _without_each(weight_K)
    return value, left_out(left_out_K, weight_K > 0)


def _without_each(x_K: np.ndarray) -> np.ndarray:
    """The sum of all others: of those before and those after, since the total less one of nearly all would cancel."""
    before_K = np.concatenate(([0.0], x_K[:-1].cumsum()))
    after_K = np.concatenate((x_K[:0:-1].cumsum()[::-1], [0.0]))
    return before_K + after_K


def _sorted(
    logit_N: np.ndarray,
    label_N: np.ndarray,
    weight_N: np.ndarray,
    group_N: np.ndarray,
    bucket_N: np.ndarray,
    buckets: int,
) -> Groups:
    is_float32 = logit_N.dtype == np.float32
    rank_N = ordered_bits(logit_N) if is_float32 else np.unique(logit_N, return_inverse=True)[1].astype(np.uint32)
    order_N = by_radix(group_N.view(np.uint64), by_radix(rank_N))
    new_group_N = _changes(group_N[order_N])
    run_R = np.flatnonzero(new_group_N | _changes(rank_N[order_N]))
    group_run_G = np.flatnonzero(new_group_N[run_R])
    group_G = run_R[group_run_G]
    label_N, weight_N = (x_N[order_N].astype(np.float64) for x_N in (label_N, weight_N))
    gain_P, gain_group_P = _ideal(label_N, new_group_N)
    sorted_bucket_N = bucket_N[order_N]
    lowest_G, highest_G = (extreme.reduceat(sorted_bucket_N, group_G) for extreme in (np.minimum, np.maximum))
    hash_G = (group_N[order_N[group_G]].view(np.uint64) >> np.uint64(32)).astype(np.uint32)
    bucket_G = np.where(lowest_G == highest_G, lowest_G, bucket_of(hash_G, buckets))
    return Groups(label_N, weight_N, gain_P, gain_group_P, run_R, group_G, group_run_G, bucket_G)


def _ideal(label_N: np.ndarray, new_group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels above 0 of rows sorted by group, by group and within it descending; and the group of each."""
    place_P = np.flatnonzero(label_N > 0)
    gain_P, group_P = label_N[place_P], np.cumsum(new_group_N, dtype=np.int32)[place_P] - 1
    if (gain_P == 1).all():
        return gain_P, group_P
    order_P = np.lexsort((-gain_P, group_P))
    return gain_P[order_P], group_P


def _changes(sorted_N: np.ndarray) -> np.ndarray:
    """Whether a sorted array's value differs from the one before; true of the first."""
    return np.concatenate(([True], sorted_N[1:] != sorted_N[:-1]))
