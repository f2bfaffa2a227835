r"""One text for equal ids, whatever holds them: the rules by which ids, keys, splits and side tables compare.

    a whole number       its digits: 7 of int8 to uint64, float and decimal (7.0, 7.00), -0.0 is 0
    a fraction           no id: refused, and so is a float beyond the whole numbers that its type holds exactly, and infinity
    a moment             ISO 8601 without zeros at the end of its second, of every unit: 2026-11-07T10:00:00.5; in UTC with a Z
                         where it has a zone; a day, or a moment without a zone at midnight, is 2026-11-07
    true, false          these words: logs that write 1 and 0 mean numbers
    text                 as it is, but that a plain number whose decimals are all zeros is the number: 7.00 is 7, and -0 is 0.
                         007, 1e5 and 1.50 are names and stay
    a missing value      missing, and NaN too

So files agree of which one was written by a tool that turns whole numbers into floats as soon as one is missing.
"""

from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.time_units import FIRST_SECOND, LAST_SECOND, PER_SECOND

EXACT = {
    16: 2**11,
    32: 2**24,
    64: 2**53,
}  # whole numbers up to here, by the bits of a float: beyond, neighbours are one
INT64_END = 2.0**63
DAY_MS = 86_400_000
WHOLE_DECIMAL = pa.decimal256(76, 0)
ZERO_DECIMALS = r"^(-?[0-9]+)\.0+$"
_CLOCK = r"(\d\d:\d\d:\d\d)(?:(\.\d*[1-9])|\.)?0*"  # of Arrow's text, which has the digits of its unit
_HOW = (
    "Make it whole or text in source.derived: CAST(... AS BIGINT) of a column of type float, or CAST(... AS VARCHAR); of "
    "outcomes and side tables in their files"
)


def canonical(values: pa.Array, where: str) -> pa.LargeStringArray:
    """Values of any type that has no parts as the texts by which they compare (see above).

    Args:
        values: B numbers, texts, moments or truth values, or codes into them.
        where: the file or key, and the column, for an error.
    Returns: B large strings, null where a value is missing.
    Raises:
        UserError: a value is no id.
    """
    if pa.types.is_dictionary(values.type):
        return canonical(values.dictionary, where).take(values.indices)
    if _is_text(values.type):
        return without_decimals(values.cast(pa.large_string()))
    check_ids(values, where)
    return as_text(values).cast(pa.large_string())


def as_ids(values: pl.Series | pa.Array, where: str) -> pa.DictionaryArray:
    """Any column without lists as codes into the canonical texts of its values, which may repeat. Raises UserError."""
    array = values if isinstance(values, pa.Array) else values.rechunk().to_arrow()
    if pa.types.is_null(array.type) or array.type == pa.float16() or pa.types.is_decimal(array.type):
        array = canonical(array, where)  # Arrow has no codes of all of these
    codes = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    return pa.DictionaryArray.from_arrays(codes.indices, canonical(codes.dictionary, where))


def check_ids(values: pa.Array, where: str) -> None:
    """Raises UserError for numbers that are not whole, or not exact, and for moments beyond the years 1 to 9999."""
    kind = values.type
    if pa.types.is_floating(kind):
        values, exact = _without_nan(values), float(EXACT[kind.bit_width])
        is_id = pc.and_(_is_whole(values), pc.less_equal(pc.abs(values), pa.scalar(exact, values.type)))
        if (found := _first_not(is_id, values)) is not None:
            if found.is_integer():
                fault = f"{found!r}, of which a float has lost the last digits. Write it as an integer"
            else:
                fault = f"{found!r}, which is no id. {_HOW}"
            raise UserError(f"{where} holds {fault}.")
    elif pa.types.is_decimal(kind):
        values = _wide(values)
        if kind.scale > 0 and (found := _first_not(_is_whole(values), values)) is not None:
            raise UserError(f"{where} holds {found}, which is no id. {_HOW}.")
    elif pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        per_second = PER_SECOND[kind.unit] if pa.types.is_timestamp(kind) else 10**3
        days = pa.types.is_date32(kind)
        ticks = pc.multiply(values.cast(pa.int32()).cast(pa.int64()), DAY_MS) if days else values.cast(pa.int64())
        first, last = max(FIRST_SECOND * per_second, -(2**63)), min((LAST_SECOND + 1) * per_second, 2**63) - 1
        if _first_not(pc.and_(pc.greater_equal(ticks, first), pc.less_equal(ticks, last)), ticks) is not None:
            raise UserError(f"{where} holds a time beyond the years 1 to 9999. Write it as a number or text.")


def as_text(values: pa.Array) -> pa.Array:
    """Values without parts as text, all that is equal as one; a fraction as Arrow writes it, and text as it is.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: their type has no text, or bytes are not UTF-8.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return as_text(values.dictionary).take(values.indices)
    if pa.types.is_floating(kind):
        return _float_text(_without_nan(values))
    if pa.types.is_decimal(kind) and kind.scale:
        return _decimal_text(_wide(values))
    if pa.types.is_timestamp(kind):
        moments = values if kind.tz is None else values.cast(pa.timestamp(kind.unit, "UTC"))
        texts = pc.replace_substring_regex(moments.cast(pa.string()), rf"^(\S+) {_CLOCK}(Z?)$", r"\1T\2\3\4")
        return pc.replace_substring_regex(texts, "T00:00:00$", "")
    if pa.types.is_time(kind):
        return pc.replace_substring_regex(values.cast(pa.string()), rf"^{_CLOCK}$", r"\1\2")
    texts = values if _is_text(kind) and kind != pa.string_view() else values.cast(pa.string())
    texts.validate(full=True)  # a file may declare text that is not UTF-8, which no later step would notice
    return texts


def without_decimals(texts: pa.Array) -> pa.Array:
    """Texts, those of a plain number whose decimals are all zeros without them: 7.00 is 7; -0 and -0.0 are 0."""
    if pc.any(pc.match_substring(texts, ".0"), min_count=0).as_py():
        texts = pc.replace_substring_regex(texts, ZERO_DECIMALS, r"\1")
    negative = pc.equal(texts, pa.scalar("-0", texts.type))
    return pc.if_else(negative, pa.scalar("0", texts.type), texts) if pc.any(negative, min_count=0).as_py() else texts


def _float_text(values: pa.Array) -> pa.Array:
    try:
        return values.cast(pa.int64()).cast(pa.string())
    except pa.ArrowInvalid:
        end = pa.scalar(INT64_END, values.type)
        is_int64 = pc.and_(pc.less(values, end), pc.greater_equal(values, pc.negate(end)))
        whole = pc.and_(_is_whole(values), is_int64)
        digits = pc.if_else(whole, values, None).cast(pa.int64()).cast(pa.string())
        return pc.if_else(whole, digits, values.cast(pa.string()))


def _decimal_text(values: pa.Array) -> pa.Array:
    try:
        return values.cast(WHOLE_DECIMAL).cast(pa.string())
    except pa.ArrowInvalid:
        whole = _is_whole(values)
        digits = pc.if_else(whole, values, None).cast(WHOLE_DECIMAL).cast(pa.string())
        return pc.if_else(whole, digits, values.cast(pa.string()))


def _is_whole(values: pa.Array) -> pa.Array:
    """Null where a value is; false of infinity."""
    whole = pc.equal(values, pc.trunc(values))
    return pc.and_(whole, pc.is_finite(values)) if pa.types.is_floating(values.type) else whole


def _without_nan(values: pa.Array) -> pa.Array:
    """Floats with NaN, the only missing number of many writers, as null."""
    values = values.cast(pa.float32()) if values.type == pa.float16() else values  # Arrow has no maths of 16 bits
    return pc.if_else(pc.is_nan(values), None, values)


def _wide(decimals: pa.Array) -> pa.Array:
    """Decimals of at least 128 bits: Arrow has no maths of fewer."""
    kind = decimals.type
    return decimals.cast(pa.decimal128(kind.precision, kind.scale)) if kind.bit_width < 128 else decimals


def _first_not(condition: pa.Array, values: pa.Array) -> Any:
    """The first of the values for which a condition is false; None where there is none."""
    if pc.all(condition, min_count=0).as_py():
        return None
    return values.filter(pc.invert(condition))[0].as_py()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
