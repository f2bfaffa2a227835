"""Bins of a number: counts of rounded values, and edges at their quantiles."""

# Shapes: V distinct values.

import numpy as np
import polars as pl


def rounded(values: np.ndarray) -> np.ndarray:
    """Values rounded down to 16 binary digits: bins need no more, and so the counts of any amount of rows stay small.

    Down, so that a value lies in the bin that starts with what it was rounded to.
    """
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.floor(mantissa * 65536) / 65536, exponent) + 0.0  # -0.0 is 0.0


def counted(values: np.ndarray) -> pl.DataFrame:
    """The frame (value, count) of rounded values."""
    return pl.Series("value", rounded(values)).value_counts().cast({"count": pl.Int64})


def bin_edges(counts: pl.DataFrame, bins: int) -> np.ndarray:
    """Ascending edges of about `bins` bins of as many rows each; the first and last are the smallest and largest value.

    A value with more rows than a bin gets edges of its own and leaves the others to the rest: quantiles of a number that is
    0 in nine rows of ten would be one and the same.

    Args:
        counts: frame (value, count), in any order.
    """
    counts = counts.sort("value")
    value_V, count_V = counts["value"].to_numpy(), counts["count"].to_numpy().astype(np.float64)
    if len(value_V) < 2:  # a column without two values carries nothing, but needs an edge on either side
        start = value_V[0] if len(value_V) else 0.0
        return np.array([start, start + max(1.0, abs(start))])
    if len(value_V) <= bins + 1:
        return value_V
    heavy_V = np.zeros(len(value_V), dtype=bool)
    while True:
        left = bins + 1 - heavy_V.sum()
        more_V = ~heavy_V & (count_V * left > count_V[~heavy_V].sum())
        if left <= 2 or not more_V.any():
            break
        heavy_V |= more_V
    own = np.flatnonzero(heavy_V[:-1])
    light_V = np.where(heavy_V, 0.0, count_V).cumsum()
    wanted = np.linspace(0, light_V[-1], max(left, 2))
    chosen = np.minimum(np.searchsorted(light_V, wanted), len(value_V) - 1)
    return value_V[np.unique(np.concatenate([chosen, own, own + 1, [0, len(value_V) - 1]]))]


def distinct(edges: np.ndarray) -> list[float]:
    """Edges in float32, as a dataset's column is: there some may be equal, and of a constant all are."""
    kept = np.unique(edges.astype(np.float32)).tolist()
    return kept if len(kept) > 1 else [kept[0], kept[0] + max(1.0, abs(kept[0]))]
