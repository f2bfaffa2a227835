"""Values of Python (JSON, and what a program may have in place of it) as Arrow columns, each of a type of its own."""

# Shapes: B rows, V items of all lists.

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from features.errors import UserError
from features.kinds.canonical import check_ids
from features.parse.convert import TEXT, convert
from features.printable import has_surrogates
from features.source import Format, RawType
from pipeline.serving.row_error import RowError

INT64 = 1 << 63
SCALARS = (str, bool, int, float, Decimal, datetime, date)


def column_of(name: str, values: Sequence[Any], kind: RawType, lists: str | None) -> pa.Array:
    """A column of B values, None where one is missing.

    Values of several types are read as a file of JSON lines would be: each as its text.

    Args:
        kind: as what it is read.
        lists: the separator of a column that may hold lists; None: it may not.
    Raises:
        RowError: a value has a type that no log has, lists are not allowed, or a number or text cannot be held.
    """
    if kind in ("float", "string"):
        try:
            return pa.array(values, pa.float64() if kind == "float" else pa.string())
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            pass  # of another type, or several
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    if any(isinstance(value, (list, tuple, np.ndarray)) for value in plain):
        if lists is None:
            row = next(i for i, value in enumerate(plain) if isinstance(value, (list, tuple, np.ndarray)))
            raise RowError(row, name, "is a list, where one value belongs")
        return _lists(name, plain, kind, lists)
    return _scalars(name, plain, kind)


def _lists(name: str, values: Sequence[Any], kind: RawType, separator: str) -> pa.Array:
    """Lists of values; beside them text is split, and another value is a list of one."""
    found: list[Sequence[Any] | None] = []
    for value in values:
        if isinstance(value, np.ndarray):
            found.append(value.tolist() if value.ndim else [value.item()])
        elif isinstance(value, str):
            found.append(value.split(separator))
        else:
            found.append(value if value is None or isinstance(value, (list, tuple)) else [value])
    length_B = np.array([0 if each is None else len(each) for each in found], np.int64)
    items = [
        item.item() if isinstance(item, np.generic) else item for each in found if each is not None for item in each
    ]
    try:
        item_V = _scalars(name, items, kind)
    except RowError as error:
        row = int(np.searchsorted(np.cumsum(length_B), error.row or 0, side="right"))
        raise RowError(row, name, f"item {error.reason}") from None
    offsets = pa.array(np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32))
    missing_B = np.array([each is None for each in found], bool)
    return pa.ListArray.from_arrays(offsets, item_V, mask=pa.array(missing_B) if missing_B.any() else None)


def _scalars(name: str, values: Sequence[Any], kind: RawType) -> pa.Array:
    """Values without parts."""
    kind_V = [_kind(value) for value in values]
    kinds = {each for each in kind_V if each is not None}
    if odd := kinds - {*SCALARS}:
        row = next(i for i, each in enumerate(kind_V) if each in odd)
        what = "an object" if isinstance(values[row], Mapping) else f"a {type(values[row]).__name__}"
        raise RowError(row, name, f"is {what}, where one value belongs")
    if len(kinds) < 2:
        return _array(name, values, kinds.pop()) if kinds else pa.nulls(len(values))
    found: list[str | None] = [None] * len(values)
    for each in sorted(kinds, key=str):
        mine = _array(name, [v if k is each else None for v, k in zip(values, kind_V, strict=True)], each)
        for row, text in enumerate(_as_text(name, mine, kind).to_pylist()):
            found[row] = found[row] if text is None else text
    return pa.array(found, TEXT)


def _as_text(name: str, values: pa.Array, kind: RawType) -> pa.Array:
    """Values of one type as texts that read as they do."""
    if kind == "string":
        try:
            check_ids(values, name)
        except UserError as error:
            raise RowError(None, name, str(error).removeprefix(f"{name} ")) from None
    elif pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return convert(values, "string", Format())


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
