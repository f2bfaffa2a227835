"""The columns of rows in any form."""

# Shapes: B rows.

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa

from features.parse.convert import decoded
from pipeline.serving.exact import check_size
from pipeline.serving.row_error import RowError

MAX_REPEATED = 1 << 26  # bytes of a column of the user that expressions read beside columns of rows

Rows: TypeAlias = pa.Table | pa.RecordBatch | pl.DataFrame | Sequence[Mapping[str, Any]]


class Column:
    """A column of B rows, as values of Python, an Arrow array, or both.

    Args:
        values: None where only the array is there. make: the array of values.
    """

    __slots__ = ("_array", "_make", "values")

    def __init__(
        self, values: Sequence[Any] | None, array: pa.Array | None = None, make: Callable[[], pa.Array] | None = None
    ) -> None:
        self.values, self._array, self._make = values, array, make

    @property
    def array(self) -> pa.Array:
        """The values, of the type in which they were given. Raises RowError."""
        if self._array is None:
            assert self._make is not None
            self._array = self._make()
        return self._array

    def repeated(self, name: str, rows: int) -> "Column":
        """The value of one row as that of many. Raises RowError where it, or all of them together, are too large."""
        check_size(name, self.array)
        if (size := self.array.nbytes * rows) > MAX_REPEATED:
            raise RowError(
                None, name, f"is repeated for {rows:,} rows: {size:,} bytes in all, allowed are {MAX_REPEATED:,}"
            )
        return Column(None, self.array.take(pa.array(np.zeros(rows, np.int64))))


@dataclass
class Given:
    """Columns of B rows."""

    columns: dict[str, Column]
    rows: int


def table_of(rows: pa.Table | pa.RecordBatch | pl.DataFrame) -> pa.Table:
    """Rows as a table of Arrow, whose columns have names of their own. Raises RowError."""
    if isinstance(rows, pl.DataFrame):
        rows = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    names = rows.column_names
    if len(set(names)) < len(names):
        raise RowError(None, next(name for name in names if names.count(name) > 1), "stands twice")
    return rows


def plain(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, without codes and views."""
    array = decoded(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())
    return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array


def values_of(
    rows: Sequence[Mapping[str, Any]], absent: Mapping[str, Any], check: Callable[[Iterable[str], int], None]
) -> dict[str, Sequence[Any]]:
    """The values of columns of B mappings.

    Args:
        absent: the columns, each with the value of rows that lack it where others have it.
        check: raises RowError where other keys of a row may not be there.
    Raises:
        RowError: a row is no mapping, or a key no text.
    """
    if (found := _values_of_like(rows, absent, check)) is not None:
        return found
    keys: dict[str, None] = {}
    for row, each in enumerate(rows):
        if not isinstance(each, Mapping):
            raise RowError(row, None, f"is no mapping of columns to values, but of type {type(each).__name__}")
        if odd := [key for key in each if not isinstance(key, str)]:
            raise RowError(
                row, None, f"{str(odd[0])[:100]} is no name of a column, but of type {type(odd[0]).__name__}"
            )
        check(each.keys() - absent.keys(), row)
        keys |= dict.fromkeys(key for key in each if key in absent)
    return {key: [row.get(key, absent[key]) for row in rows] for key in keys}


def _values_of_like(
    rows: Sequence[Mapping[str, Any]], absent: Mapping[str, Any], check: Callable[[Iterable[str], int], None]
) -> dict[str, Sequence[Any]] | None:
    """The same of dicts with equal keys, without a loop over rows; None for others."""
    if {*map(type, rows)} != {dict}:
        return None
    names = tuple(rows[0])
    if len(names) < 2 or {*map(len, rows)} != {len(names)} or {*map(type, names)} != {str}:
        return None
    try:
        columns = zip(*map(itemgetter(*names), rows), strict=True)
    except KeyError:
        return None
    check(rows[0].keys() - absent.keys(), 0)
    return {name: values for name, values in zip(names, columns, strict=True) if name in absent}
