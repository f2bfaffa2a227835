"""Values of Python (JSON, and what a program may have in place of it) as Arrow columns, each of a type of its own."""

# Shapes: B rows, V items of all lists.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.errors import UserError
from features.kinds.canonical import check_ids
from features.kinds.values import cleaned
from features.parse.convert import TEXT, convert
from features.printable import has_surrogates
from features.source import Format, RawType
from pipeline.serving.row_error import RowError

INT64 = 1 << 63
MAX_BYTES = 1 << 20  # of a text
MAX_ITEMS = 100_000  # of a list, of which the first count
LISTS = (list, tuple, np.ndarray)
SCALARS = (str, bool, int, float, Decimal, datetime, date)


@dataclass(frozen=True)
class Reading:
    """How a column is read.

    Attributes:
        kind: as what. separator: of items, where it may hold lists; None: it may not. ids: whether values, or items, are ids.
        form: of its texts.
    """

    name: str
    kind: RawType
    separator: str | None
    ids: bool
    form: Format


def column_of(read: Reading, values: Sequence[Any]) -> pa.Array:
    """A column of B values, None where one is missing.

    Values of several types are read as a file of JSON lines would be: each as its text.

    Raises:
        RowError: a value has a type that no log has, lists are not allowed, or a number or text cannot be held.
    """
    if read.kind in ("float", "string"):
        try:
            return pa.array(values, pa.float64() if read.kind == "float" else pa.string())
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            pass  # of another type, or several
    if (array := _lists_alike(read, values)) is not None:
        return array
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    if any(isinstance(value, LISTS) for value in plain):
        return _lists(read, plain)
    return _scalars(read, plain)


def check_lengths(name: str, length_B: np.ndarray) -> None:
    """Raises RowError where a list has more than MAX_ITEMS."""
    if length_B.max(initial=0) > MAX_ITEMS:
        row = int(length_B.argmax())
        raise RowError(row, name, f"has {length_B[row]:,} items, allowed are {MAX_ITEMS:,}")


def _lists_alike(read: Reading, values: Sequence[Any]) -> pa.Array | None:
    """Lists whose items have one type, without a loop over them; None for others."""
    if read.separator is None or not {*map(type, values)} <= {list, type(None)}:
        return None
    kinds = {*map(type, chain.from_iterable(each for each in values if each))} - {type(None)}
    numbers = pa.float64() if kinds <= {int, float} and not read.ids else pa.int64() if kinds == {int} else None
    kind = pa.string() if kinds == {str} else numbers
    try:
        return kind and pa.array(values, pa.list_(kind))
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def _lists(read: Reading, values: Sequence[Any]) -> pa.Array:
    """Lists of values; beside them text is split, and another value is a list of one."""
    if read.separator is None:
        row = next(i for i, value in enumerate(values) if isinstance(value, LISTS))
        raise RowError(row, read.name, "is a list, where one value belongs")
    texts = pl.Series([value if isinstance(value, str) else None for value in values], dtype=pl.String)
    found: list[Any] = []
    for value, text in zip(values, cleaned(texts, read.form), strict=True):
        if isinstance(value, np.ndarray):
            found.append(value.tolist() if value.ndim else [value.item()])
        elif isinstance(value, str):
            found.append(None if text is None else text.split(read.separator))
        else:
            found.append(value if value is None or isinstance(value, LISTS) else [value])
    length_B = np.array([0 if each is None else len(each) for each in found], np.int64)
    check_lengths(read.name, length_B)  # before each item is converted
    items = [
        item.item() if isinstance(item, np.generic) else item for each in found if each is not None for item in each
    ]
    try:
        item_V = _scalars(read, items)
    except RowError as error:
        row = int(np.searchsorted(np.cumsum(length_B), error.row or 0, side="right"))
        raise RowError(row, read.name, f"item {error.reason}") from None
    offsets = pa.array(np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32))
    missing_B = np.array([each is None for each in found], bool)
    return pa.ListArray.from_arrays(offsets, item_V, mask=pa.array(missing_B) if missing_B.any() else None)


def _scalars(read: Reading, values: Sequence[Any]) -> pa.Array:
    """Values without parts."""
    if len(plain := {*map(type, values)} - {type(None)}) == 1 and plain < {*SCALARS}:
        return _array(read.name, values, plain.pop())
    kind_V = [_kind(value) for value in values]
    kinds = {each for each in kind_V if each is not None}
    if odd := kinds - {*SCALARS}:
        row = next(i for i, each in enumerate(kind_V) if each in odd)
        value = values[row]
        what = "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}"
        what = "a list" if isinstance(value, LISTS) else what
        raise RowError(row, read.name, f"is {what}, where one value belongs")
    if len(kinds) < 2:
        return _array(read.name, values, kinds.pop()) if kinds else pa.nulls(len(values))
    found: list[str | None] = [None] * len(values)
    for each in sorted(kinds, key=str):
        mine = _array(read.name, [v if k is each else None for v, k in zip(values, kind_V, strict=True)], each)
        for row, text in enumerate(_as_text(read, mine).to_pylist()):
            found[row] = found[row] if text is None else text
    return pa.array(found, TEXT)


def _as_text(read: Reading, values: pa.Array) -> pa.Array:
    """Values of one type as texts that read as they do."""
    if read.kind != "string" and pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    fractions = pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)
    if read.kind == "string" and read.ids and fractions:
        _check_ids(read.name, values)
    return convert(values, "string", read.form)


def _check_ids(name: str, values: pa.Array, first: int = 0) -> None:
    """Raises RowError for the first value that is no id. first: the row of the first one."""
    try:
        check_ids(values, name)
    except UserError as error:
        if (half := len(values) // 2) == 0:
            raise RowError(first, name, str(error).removeprefix(f"{name} ")) from None
        _check_ids(name, values[:half], first)
        _check_ids(name, values[half:], first + half)


def _kind(value: Any) -> type | None:
    """The type of a value without parts, or its own."""
    if value is None:
        return None
    return (
        next((kind for kind in SCALARS if isinstance(value, kind)), type(value))
        if not isinstance(value, bool)
        else bool
    )


def _array(name: str, values: Sequence[Any], kind: type) -> pa.Array:
    """Values of one type, None where one is missing."""
    try:
        if kind is int:
            return pa.array(values, pa.int64())
        return pa.array(values, {str: TEXT, float: pa.float64(), bool: pa.bool_()}.get(kind))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        row = next((i for i, value in enumerate(values) if value is not None and _unfit(value)), None)
        if row is None:
            raise RowError(None, name, str(error).splitlines()[0]) from None
        raise RowError(row, name, _unfit(values[row]) or "") from None


def _unfit(value: Any) -> str | None:
    """Why a value cannot be held."""
    if isinstance(value, int) and not -INT64 <= value < INT64:
        return "is a number of more than 64 bits: write it as text"
    if isinstance(value, str) and has_surrogates(value):
        return "is no text: it has half of a character (a lone surrogate)"
    return None
