"""From text to values: numbers, times and ids of a block of rows, and what is wrong with those that are none."""

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.schema.source import Format, RawType

WORDS = {"float": "a number", "int": "an integer", "time": "a time"}
KINDS = {"float": pl.Float64, "int": pl.Int64, "time": pl.Int64}
_HEX_DIGITS = (
    r"^0[xX]([0-9a-fA-F]{1,16})$"  # pyarrow reads these as integers, so a block that is read as text must, too
)
_TIME = r"^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(?:[.,]\d+)?)?\s*(Z|z|UTC|[+-]\d\d(?::?\d\d)?)?$"


def cleaned(texts: pl.Series, form: Format) -> pl.Series:
    """Texts with spaces stripped where the schema says so, and missing markers as nulls."""
    texts = texts.str.strip_chars() if form.trim else texts
    marked = texts.is_in(form.missing) if form.missing else pl.Series([False], dtype=pl.Boolean)
    return texts.set(marked, None) if marked.any() else texts


def numbers(texts: pl.Series, kind: RawType, form: Format) -> tuple[pl.Series, pl.Series]:
    """Cleaned texts as numbers, times as seconds since 1970 UTC, and which of the texts are none."""
    bare = texts.str.strip_chars(" \t")
    values = bare.cast(KINDS[kind], strict=False)
    if kind == "float":
        values = values.set(~values.is_finite().fill_null(True), None)
    elif (left := values.is_null() & bare.is_not_null()).any():
        found = _hexadecimal(bare.filter(left))
        if kind == "time":
            found = found.zip_with(found.is_not_null(), times(bare.filter(left), form))
        values = values.scatter(left.arg_true(), found)
    return values, values.is_null() & texts.is_not_null()


def times(texts: pl.Series, form: Format) -> pl.Series:
    """ISO 8601 dates and times as whole seconds since 1970 UTC; null where a text is none.

    A text without an offset is in the format's time zone; of an hour that the clock shows twice it is the first.
    """
    part = texts.str.extract_groups(_TIME).struct
    clock = part.field("2").fill_null("00:00") + part.field("3").fill_null(":00")
    naive = (part.field("1") + " " + clock).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
    offset = part.field("4").str.replace_all(":", "", literal=True)
    signed = offset.str.extract(r"^([+-])", 1).replace_strict({"+": 1, "-": -1}, default=0, return_dtype=pl.Int64)
    hours = offset.str.slice(1, 2).cast(pl.Int64, strict=False).fill_null(0)
    minutes = offset.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0)
    absolute = naive.dt.epoch("s") - signed * (hours * 3600 + minutes * 60)
    local = naive.dt.replace_time_zone(form.timezone, ambiguous="earliest", non_existent="null").dt.epoch("s")
    return local.zip_with(offset.is_null(), absolute)


def _hexadecimal(texts: pl.Series) -> pl.Series:
    return (
        texts.str.extract(_HEX_DIGITS, 1)
        .str.to_integer(base=16, strict=False, dtype=pl.UInt64)
        .reinterpret(signed=True)
    )


def coded(texts: pa.Array, form: Format) -> pa.DictionaryArray:
    """Texts, cleaned, as codes into their values, which may repeat."""
    array = texts.dictionary_encode()
    values, codes = array.dictionary.cast(pa.large_string()), array.indices
    # As `cleaned` does it: pyarrow's spaces are others, and a key that is also a feature must be one and the same.
    values = pl.Series(values, dtype=pl.String).str.strip_chars().to_arrow() if form.trim else values
    gone_V = pc.is_in(values, value_set=pa.array(form.missing, pa.large_string())).to_numpy(False)
    if gone_V.any():
        lost_B = codes.is_null().to_numpy(False) | gone_V[codes.fill_null(0).to_numpy()]
        codes = pa.array(codes.fill_null(0).to_numpy(), mask=lost_B)
    return pa.DictionaryArray.from_arrays(codes, values)


def as_ids(values: pl.Series | pa.Array) -> pa.DictionaryArray:
    """Any column as codes into the text of its distinct values: 3, 3.5, true."""
    array = values if isinstance(values, pa.Array) else values.rechunk().to_arrow()
    if pa.types.is_dictionary(array.type):
        return array
    if pa.types.is_null(array.type):
        array = array.cast(pa.large_string())
    codes = array.dictionary_encode()
    distinct: pl.Series = pl.from_arrow(codes.dictionary)  # type: ignore[assignment]
    return pa.DictionaryArray.from_arrays(codes.indices, distinct.cast(pl.String).to_arrow().cast(pa.large_string()))
