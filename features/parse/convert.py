"""Columns with types of their own (Parquet, Avro, requests) as blocks have them: text, lists of text, numbers."""

from collections.abc import Collection, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.kinds import times
from features.kinds.canonical import as_text, check_ids
from features.source import Format, RawType

TEXT, LIST = pa.string(), pa.list_(pa.string())


class NotUTF8Error(UserError):
    """A text is not UTF-8, though a file declares it as text or a schema wants it as such."""


def convert_columns(
    path: str, columns: Mapping[str, pa.Array], types: Mapping[str, RawType], options: Format, ids: Collection[str] = ()
) -> pa.Table:
    """The columns of a block, in the order of `types`, `ids` as canonical texts.

    Raises:
        NotUTF8Error: a text is not UTF-8, see `not_utf8`.
        UserError: a column is of another type, or a value of `ids` is no id, naming the file.
    """
    found = {}
    for name, wanted in types.items():
        try:
            values, where = decoded(columns[name]), f"{path}: column {name}"
            if not (name in ids and wanted == "string"):
                found[name] = convert(values, wanted, options)
            elif is_list(values.type):
                found[name] = _lists_of_ids(values, where)
            else:
                check_ids(values, where)
                found[name] = convert(values, wanted, options)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            if "UTF8" in (fault := str(error).splitlines()[0]):
                raise NotUTF8Error(f"{path}: column {name} has bytes that are not UTF-8: write them as text.") from None
            raise UserError(
                f"{path}: column {name} is {columns[name].type}, which cannot be read as text or numbers: {fault}. Write it "
                "as another type."
            ) from None
    return pa.table(found)


def convert(values: pa.Array, wanted: RawType, options: Format) -> pa.Array:
    """A column as text, numbers or lists of text.

    Wanted as a number it is float64 or, for int and time, int64, or text where a value is neither. NaN is missing. Timestamps
    are whole seconds, rounded down: wanted as a time they stay timestamps, as a number they are seconds since 1970 UTC.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: its type cannot be converted, or its bytes are not UTF-8.
    """
    values = decoded(values)
    kind = values.type
    if wanted == "string":
        return _lists(values) if is_list(kind) else as_text(values).cast(TEXT)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = _seconds(values)
        if wanted == "time":
            return values
        values = _since_1970(values, options)
    elif pa.types.is_boolean(kind):
        values = values.cast(pa.int8())
    elif pa.types.is_floating(kind):  # NaN: the only missing number of many writers
        values = values.cast(pa.float32()) if kind == pa.float16() else values
        values = pc.if_else(pc.is_nan(values), None, values)
        if wanted == "time":  # such as whole numbers beside a missing one
            values = pc.floor(values)
    return _as_numbers(values, pa.float64() if wanted == "float" else pa.int64())


def decoded(values: pa.Array) -> pa.Array:
    """Codes as the values they stand for."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of any kind."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _lists(values: pa.Array) -> pa.Array:
    """Lists of text; a file may declare text that is not UTF-8, which no later step would notice."""
    found = values.cast(LIST)
    found.validate(full=True)
    return found


def _lists_of_ids(values: pa.Array, where: str) -> pa.Array:
    """Lists of canonical texts. Raises UserError, naming `where`, for an item that is no id."""
    kind = values.type.value_type
    if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _lists(values)
    check_ids(values.flatten(), where)
    lists = pa.concat_arrays([values.cast(pa.list_(kind))])
    missing = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(lists.offsets, as_text(lists.values).cast(TEXT), mask=missing)


def _as_numbers(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Numbers of one kind; as text where a value is text, not of the kind, or not finite."""
    is_float = pa.types.is_floating(values.type)
    if not (is_float or pa.types.is_integer(values.type) or pa.types.is_decimal(values.type)):
        return as_text(values).cast(TEXT)
    if not is_float or pc.all(pc.is_finite(values), min_count=0).as_py():
        try:
            return values.cast(kind)
        except pa.ArrowInvalid:
            pass
    return _exact_text(values, kind)


def _exact_text(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Numbers of which some are not of a kind, as texts that read as the others exactly."""
    if pa.types.is_floating(values.type) and kind == pa.float64():
        values = values.cast(kind)  # so that .1 in 32 bits is what it is beside good values
    return as_text(values).cast(TEXT)


def _seconds(values: pa.Array) -> pa.Array:
    """Timestamps and dates as whole seconds, rounded down; those without a zone stay without one."""
    if pa.types.is_date(values.type):
        return values.cast(pa.timestamp("s"))
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]
    ticks = values.cast(pa.int64())
    whole = pc.divide(ticks, per_second)  # towards zero
    whole = pc.subtract(whole, pc.less(ticks, pc.multiply(whole, per_second)).cast(pa.int64()))
    return whole.cast(pa.timestamp("s", values.type.tz and "UTC"))


def _since_1970(values: pa.Array, options: Format) -> pa.Array:
    """Timestamps as seconds since 1970 UTC; as text where the clocks of the zone skipped one of them, which stays as it is."""
    found, wrong = times.seconds("", values, options)
    if not wrong.any():
        return found.to_arrow()
    return pc.if_else(wrong.to_arrow(), values.cast(TEXT), found.to_arrow().cast(TEXT))
