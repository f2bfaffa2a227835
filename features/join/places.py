"""Where a key and a moment stand among events that are sorted by both, without a loop over rows."""

# Shapes: I impressions, E events.

from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa


class Places:
    """The order of events by key, then time, then as they were given; and the places of other moments in it.

    Args:
        key_E: numbers of keys, from 0.
        time_E: int64, of any size.

    Attributes:
        order_E: index of the event at each place.
    """

    def __init__(self, key_E: np.ndarray, time_E: np.ndarray) -> None:
        self._times = np.unique(time_E)
        number_E = self._number(key_E, np.searchsorted(self._times, time_E))
        self.order_E = np.argsort(number_E, kind="stable")
        self._number_E = number_E[self.order_E]

    def _number(self, key: np.ndarray, rank: np.ndarray | int) -> np.ndarray:
        # Ranks of times instead of times: key and time fit into one integer, whatever the times are.
        return key * (len(self._times) + 1) + rank

    def first(self, key_I: np.ndarray) -> np.ndarray:
        """The place of the first event of each key, or where it would be."""
        return np.searchsorted(self._number_E, self._number(key_I, 0))

    def of(self, key_I: np.ndarray, time_I: np.ndarray, side: Literal["left", "right"] = "left") -> np.ndarray:
        """The place before (left) or after (right) the events of that key and time."""
        return np.searchsorted(self._number_E, self._number(key_I, np.searchsorted(self._times, time_I, side=side)))


def key_codes(keys: pl.Series) -> np.ndarray:
    """Keys as numbers from 1, equal ones for equal keys, and 0 for a missing one: int64."""
    array = keys.rechunk().to_arrow()
    codes = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    return codes.indices.cast(pa.int64()).fill_null(-1).to_numpy() + 1
