"""Columns of formats with types of their own (Parquet, Avro) as blocks have them: text, lists of text, numbers."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.kinds import times
from features.source import Format, RawType

TEXT, LIST = pa.string(), pa.list_(pa.string())


def convert_columns(
    path: str, columns: Mapping[str, pa.Array], types: Mapping[str, RawType], options: Format
) -> pa.Table:
    """The columns of a block, in the order of `types`. Raises UserError for one of another type, naming the file."""
    found = {}
    for name, wanted in types.items():
        try:
            found[name] = convert(columns[name], wanted, options)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"{path}: column {name} is {columns[name].type}, which cannot be read as text or numbers: "
                f"{str(error).splitlines()[0]}. Write it as another type."
            ) from None
    return pa.table(found)


def convert(values: pa.Array, wanted: RawType, options: Format) -> pa.Array:
    """A column as text, numbers or lists of text.

    Wanted as a number it is float64 or, for int and time, int64, or text where a value is neither. NaN is missing. Timestamps
    are whole seconds, rounded down: wanted as a time they stay timestamps, as a number they are seconds since 1970 UTC.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: its type cannot be converted, or its bytes are not UTF-8.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return convert(values.dictionary_decode(), wanted, options)
    if pa.types.is_floating(kind):  # the only missing number of many writers
        values = pc.if_else(pc.is_nan(values), None, values)
    if wanted == "string":
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return _text(values, LIST if any(check(kind) for check in lists) else TEXT)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = _seconds(values)
        if wanted == "time":
            return values
        values = _since_1970(values, options)
    elif pa.types.is_boolean(kind):
        values = values.cast(pa.int8())
    elif kind == pa.float16():
        values = values.cast(pa.float32())
    if wanted == "time" and pa.types.is_floating(values.type):  # such as whole numbers beside a missing one
        values = pc.floor(values)
    return _as_numbers(values, pa.float64() if wanted == "float" else pa.int64())


def _text(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Text or lists of it; a file may call bytes text that are none, which no later step would notice."""
    found = values.cast(kind)
    found.validate(full=True)
    return found


def _as_numbers(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Numbers of one kind; as text where a value is text, not of the kind, or not finite."""
    is_float = pa.types.is_floating(values.type)
    if not (is_float or pa.types.is_integer(values.type) or pa.types.is_decimal(values.type)):
        return _text(values, TEXT)
    if is_float and not pc.all(pc.is_finite(values), min_count=0).as_py():
        return values.cast(TEXT)
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return values.cast(TEXT)


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
