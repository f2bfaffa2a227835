"""Histories: the last items of a user strictly before each impression, without a loop over rows."""

# Shapes: I impressions, E events, V items of all lists together.

import numpy as np


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
    order_E = np.lexsort((np.arange(len(time_E)), time_E, user_E))
    times = np.unique(time_E)
    number_E = user_E[order_E] * (len(times) + 1) + np.searchsorted(times, time_E[order_E])
    stop_I = np.searchsorted(number_E, user_I * (len(times) + 1) + np.searchsorted(times, time_I))
    start_I = np.maximum(np.searchsorted(number_E, user_I * (len(times) + 1)), stop_I - length)
    count_I = stop_I - start_I
    offsets = np.concatenate([[0], np.cumsum(count_I)]).astype(np.int64)
    place_V = np.repeat(stop_I - 1 + offsets[:-1], count_I) - np.arange(offsets[-1])
    return offsets, order_E[place_V]
