"""Histories: the last items of a user strictly before each impression, without a loop over rows."""

# Shapes: I impressions, E events, V items of all lists together.

import numpy as np
import polars as pl

from features.join.places import Places


def recent(
    user_I: np.ndarray, time_I: np.ndarray, user_E: np.ndarray, time_E: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each impression the last events of its user strictly before its time, the latest first.

    Events of one user in the same second follow each other as they are given, the last given being the latest.

    Args:
        user_I, user_E: numbers of users, from 0.
        time_I, time_E: seconds.
        length: of a list at most.
    Returns: offsets of the lists, int64 of shape (I + 1,), and the index of the event for each element, int64 of shape (V,).
    """
    places = Places(user_E, time_E)
    stop_I = places.of(user_I, time_I)
    start_I = np.maximum(places.first(user_I), stop_I - length)
    count_I = stop_I - start_I
    offsets = np.concatenate([[0], np.cumsum(count_I)]).astype(np.int64)
    place_V = np.repeat(stop_I - 1 + offsets[:-1], count_I) - np.arange(offsets[-1])
    return offsets, places.order_E[place_V]


def kept(events: pl.DataFrame, horizon: int, length: int) -> pl.DataFrame:
    """The events that lists of impressions from `horizon` on can need: with them in place of all, these lists are the same.

    Args:
        events: columns key, known (seconds), item, in the order of their rows.
        horizon: seconds; events that become known from then on are all kept, of earlier ones the last `length` of each key.
    """
    numbered = events.with_row_index("__place")
    past = numbered.filter(pl.col("known") < horizon).sort("known", maintain_order=True)
    past = past.group_by("key", maintain_order=True).tail(length).sort("__place")
    later = numbered.filter(pl.col("known") >= horizon)
    return pl.concat([past.select(later.columns), later]).drop("__place")
