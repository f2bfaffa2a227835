"""XAUC: the share of pairs of rows that a regression orders as their labels are ordered, exact in O(N log N)."""

# Shapes: N rows, K buckets.

import numpy as np

from pipeline.evaluation.metrics.intervals import left_out

# Of what remains of a total after a bucket is taken from it: below, it would be rounding errors.
SMALLEST_SHARE = 1e-9


def xauc(
    prediction_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray, bucket_N: np.ndarray, buckets: int
) -> tuple[float, np.ndarray]:
    """XAUC over all pairs of rows with different labels (Zhan et al., KDD 2022, "Deconfounding Duration Bias in Watch-time
    Prediction", there over sampled pairs).

    A pair of rows of weights v and w counts v w, with equal predictions half. For labels of two values it is AUC.

    Args:
        weight_N: rows of weight 0 do not count. bucket_N: in 0 .. buckets - 1.
    Returns: the value, NaN where undefined (no such pair, or a prediction that is not finite), and left_out_K, the values
        without each bucket: of all pairs less those with a row of the bucket; undefined where less than 1e-9 of the pairs'
        weight remains (`intervals.left_out`).
    """
    keep_N = weight_N > 0
    columns = (x_N[keep_N] for x_N in (prediction_N, label_N, weight_N, bucket_N))
    prediction_N, label_N, weight_N, bucket_N = columns
    undefined = np.nan, np.full(buckets, np.nan)
    if not len(label_N) or not np.isfinite(prediction_N).all():
        return undefined
    rank_N, label_rank_N = (np.unique(x_N, return_inverse=True)[1] for x_N in (prediction_N, label_N))
    weight_N, bucket_N = weight_N.astype(np.float64), bucket_N.astype(np.int64)
    together_N = np.zeros_like(rank_N)
    # Twice all pairs by the buckets of their rows: a pair is in the sum of both of its rows.
    won_K, pairs_K = _sums(rank_N, label_rank_N, weight_N, together_N, bucket_N, buckets)
    won, pairs = won_K.sum() / 2, pairs_K.sum() / 2
    if not pairs > 0:
        return undefined
    own_won_K, own_pairs_K = _sums(rank_N, label_rank_N, weight_N, bucket_N, bucket_N, buckets)
    left_won_K, left_pairs_K = won - won_K + own_won_K / 2, pairs - pairs_K + own_pairs_K / 2
    enough_K = left_pairs_K > SMALLEST_SHARE * pairs
    left_K = np.divide(left_won_K, left_pairs_K, out=np.full(buckets, np.nan), where=enough_K)
    return float(won / pairs), left_out(left_K, np.bincount(bucket_N, minlength=buckets) > 0)


def _sums(
    rank_N: np.ndarray,
    label_rank_N: np.ndarray,
    weight_N: np.ndarray,
    block_N: np.ndarray,
    bucket_N: np.ndarray,
    buckets: int,
) -> tuple[np.ndarray, np.ndarray]:
    """won_K and pairs_K: over each bucket's rows, the weight of the pairs that a row is in with rows of its block.

    Args:
        rank_N, label_rank_N: of predictions and labels, from 0, equal ones equal. block_N: from 0.
    """
    # Of equal labels the highest prediction first: below, such a pair then is never one of an earlier, lower row.
    order_N = np.lexsort((-rank_N, label_rank_N, block_N))
    rank_N, label_rank_N, weight_N, block_N, bucket_N = (
        x_N[order_N] for x_N in (rank_N, label_rank_N, weight_N, block_N, bucket_N)
    )
    starts = _starts(block_N)
    pairs_N = _run_sums(weight_N, starts) - _run_sums(weight_N, starts | _starts(label_rank_N))
    won_K = np.bincount(bucket_N, weight_N * _won(rank_N, label_rank_N, weight_N, block_N), buckets)
    return won_K, np.bincount(bucket_N, weight_N * pairs_N, buckets)


def _won(rank_N: np.ndarray, label_rank_N: np.ndarray, weight_N: np.ndarray, block_N: np.ndarray) -> np.ndarray:
    """won_N: of each row, the weight of the rows of its block before it with a lower rank and after it with a higher one, and
    half that of those with the same rank and another label.

    Bit by bit from the highest: rows whose ranks agree above a bit lie together in their order, and of two of them the one
    with bit 0 is the lower. Then all rows of bit 0 go before all of bit 1, which keeps rows that agree together.
    """
    levels = int(rank_N.max()).bit_length()
    code_N = (block_N << levels) | rank_N
    place_N = np.arange(len(code_N))
    won_N = np.zeros(len(code_N))
    for level in reversed(range(levels)):
        high_N = (code_N >> level & 1).astype(bool)
        first_N = np.flatnonzero(_starts(code_N >> (level + 1)))
        length_N = np.diff(first_N, append=len(code_N))
        lower_N = np.where(high_N, 0.0, weight_N).cumsum()
        higher_N = np.where(high_N, weight_N, 0.0).cumsum()
        before_N = np.where(first_N > 0, lower_N[first_N - 1], 0.0)
        end_N = higher_N[first_N + length_N - 1]
        won_N += np.where(high_N, lower_N - np.repeat(before_N, length_N), np.repeat(end_N, length_N) - higher_N)
        split_N = np.concatenate((np.flatnonzero(~high_N), np.flatnonzero(high_N)))
        code_N, weight_N, place_N, won_N = code_N[split_N], weight_N[split_N], place_N[split_N], won_N[split_N]
    starts_N = _starts(code_N)
    tied_N = _run_sums(weight_N, starts_N) - _run_sums(weight_N, starts_N | _starts(label_rank_N[place_N]))
    in_place_N = np.empty_like(won_N)
    in_place_N[place_N] = won_N + tied_N / 2
    return in_place_N


def _starts(x_N: np.ndarray) -> np.ndarray:
    """Whether a value differs from the one before it."""
    return np.concatenate(([True], x_N[1:] != x_N[:-1]))


def _run_sums(weight_N: np.ndarray, starts_N: np.ndarray) -> np.ndarray:
    """Each row's sum of weights over its run, which begins where `starts_N` is true."""
    first_N = np.flatnonzero(starts_N)
    return np.repeat(np.add.reduceat(weight_N, first_N), np.diff(first_N, append=len(weight_N)))
