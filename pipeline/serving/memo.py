"""Ids of values that were encoded before: most values of a request were in earlier ones."""

# Shapes: B rows, V distinct values.

from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Any

import numpy as np
import pyarrow as pa

from features.fit.encoders import MISSING
from pipeline.serving.row_error import RowError

LARGEST = 256  # bytes of memory of a text that is remembered: a character takes one, two or four
MOST_DISTINCT = 4096  # of a column: more of them are not looked up one by one


class Memo:
    """The ids of a raw column's values in a table, of texts and of whole numbers apart.

    Threads may share it: each operation on a dict is whole, and a value that is forgotten meanwhile is encoded again.

    Attributes:
        known: ids of texts, and of whole numbers.
    Args:
        exact: encodes values, B of any type; raises RowError.
        most: values that are remembered of either; then all are forgotten, so that no request can keep others' out.
        missing: what is known of None at first: that its id is MISSING, or nothing, as of what is computed from a column.
    """

    def __init__(self, exact: Callable[[pa.Array], np.ndarray], most: int, missing: bool = True) -> None:
        self._exact, self._most = exact, most
        self._first: dict[Any, int] = {None: MISSING} if missing else {}
        self.known: tuple[dict[Any, int], dict[Any, int]] = (self._first.copy(), self._first.copy())

    def of_values(self, values: Sequence[Any]) -> np.ndarray | None:
        """Ids of B values of Python; None unless all are known texts or all known whole numbers, or missing."""
        try:  # no value of another type is equal to a text
            return np.fromiter(map(self.known[0].get, values), np.int64, len(values))
        except TypeError:  # of None for an unknown value, and of values that have no hash
            if not {*map(type, values)} <= {int, type(None)}:
                return None
        try:
            return np.fromiter(map(self.known[1].get, values), np.int64, len(values))
        except TypeError:
            return None

    def ids(self, values: pa.Array) -> np.ndarray:
        """Ids of B values, null where one is missing. Raises RowError."""
        kind = values.type
        if pa.types.is_null(kind):
            return np.full(len(values), MISSING)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            known = self.known[0]
        elif pa.types.is_integer(kind):
            known = self.known[1]
        else:  # in a dict 1, 1.0 and True are equal, and their ids need not be
            return self._exact(values)
        codes = values.dictionary_encode()
        if len(codes.dictionary) > MOST_DISTINCT:
            return self._exact(values)
        distinct = codes.dictionary.to_numpy(zero_copy_only=False).tolist()
        id_V: list[Any] = [*map(known.get, distinct), MISSING]
        if None in id_V:
            unknown = [place for place, each in enumerate(id_V) if each is None]
            self._fill(id_V, unknown, codes)
            self._remember(known, [(distinct[place], id_V[place]) for place in unknown])
        index_B = codes.indices.fill_null(len(distinct)) if codes.null_count else codes.indices
        return np.array(id_V)[index_B.to_numpy()]

    def learn(self, values: Sequence[Any], id_B: np.ndarray) -> None:
        """Remembers ids of B values of Python, if these are all texts or all whole numbers, or missing."""
        kinds = {*map(type, values)} - {type(None)}
        if kinds in ({str}, {int}):
            self._remember(self.known[kinds == {int}], [*dict(zip(values, id_B.tolist(), strict=True)).items()])

    def _fill(self, id_V: list[Any], unknown: list[int], codes: pa.DictionaryArray) -> None:
        try:
            found = self._exact(codes.dictionary.take(pa.array(unknown)))
        except RowError as error:
            if error.row is None:
                raise
            raise error.at(codes.indices.index(unknown[error.row]).as_py()) from None
        for place, each in zip(unknown, found.tolist(), strict=True):
            id_V[place] = each

    def _remember(self, known: dict[Any, int], found: list[tuple[Any, int]]) -> None:
        short = [(value, each) for value, each in found if getsizeof(value) <= LARGEST]
        if len(known) + len(short) > self._most:
            known.clear()
            known.update(self._first)
        known.update(short[: self._most])
