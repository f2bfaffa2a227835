"""From text to values: numbers, ids and lists of a block of rows, and which of them are not valid."""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.source import Format, RawType

WORDS = {"float": "a number", "int": "an integer", "time": "a time"}
LARGEST = float(np.finfo(np.float32).max)
KINDS = {"float": pl.Float64, "int": pl.Int64}
_HEX_DIGITS = (
    r"^0[xX]([0-9a-fA-F]{1,16})$"  # pyarrow reads these as integers, so a block that is read as text must, too
)


def cleaned(texts: pl.Series, form: Format) -> pl.Series:
    """Texts with spaces stripped if the format is to, and missing markers as nulls."""
    texts = texts.str.strip_chars() if form.trim else texts
    marked = texts.is_in(form.missing) if form.missing else pl.Series([False], dtype=pl.Boolean)
    return texts.set(marked, None) if marked.any() else texts


def numbers(texts: pl.Series, kind: RawType) -> tuple[pl.Series, pl.Series]:
    """Cleaned texts as numbers, and which of the texts are not valid."""
    bare = texts.str.strip_chars(" \t")
    values = bare.cast(KINDS[kind], strict=False)
    if kind == "float":
        values = values.set(~values.is_finite().fill_null(True), None)
    elif (left := values.is_null() & bare.is_not_null()).any():
        values = values.scatter(left.arg_true(), hexadecimal(bare.filter(left)))
    return values, values.is_null() & texts.is_not_null()


def hexadecimal(texts: pl.Series) -> pl.Series:
    """Texts such as 0x1F as int64; null where a text is none."""
    return (
        texts.str.extract(_HEX_DIGITS, 1)
        .str.to_integer(base=16, strict=False, dtype=pl.UInt64)
        .reinterpret(signed=True)
    )


def coded(texts: pa.Array, form: Format) -> pa.DictionaryArray:
    """Texts, cleaned, as codes into their values, which may repeat."""
    array = texts.dictionary_encode()
    values, codes = array.dictionary.cast(pa.large_string()), array.indices
    # As `cleaned` does it: pyarrow strips other spaces, and a key that is also a feature must be the same text.
    values = pl.Series(values, dtype=pl.String).str.strip_chars().to_arrow() if form.trim else values
    null_V = pc.is_in(values, value_set=pa.array(form.missing, pa.large_string())).to_numpy(False)
    if null_V.any():
        null_B = codes.is_null().to_numpy(False) | null_V[codes.fill_null(0).to_numpy()]
        codes = pa.array(codes.fill_null(0).to_numpy(), mask=null_B)
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


def as_lists(values: pa.Array, separator: str) -> pa.LargeListArray:
    """Lists, as they are or of the parts of texts."""
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        values = pc.split_pattern(values.cast(pa.large_string()), separator)
    return values.cast(pa.large_list(values.type.value_type))


def finite_numbers(name: str, values: pa.Array, column: str) -> tuple[pa.Array, pl.Series | None]:
    """A column as float64, and why some of its rows are dead letters (None: none is).

    Args:
        name: of the feature. column: where it comes from, for an error.
    Raises:
        UserError: it is not numeric.
    """
    series = pl.Series(values)
    if not (series.dtype.is_numeric() or series.dtype in (pl.Boolean, pl.Null)):
        raise UserError(f"{column} is {series.dtype}, it must be a number")
    numbers = series.cast(pl.Float64).rechunk()
    array = numbers.to_arrow()
    # Infinite after LN(0), or beyond float32: one such value would spoil the mean, and so every row.
    span = pc.min_max(array).as_py()
    if max(-(span["min"] or 0.0), span["max"] or 0.0) <= LARGEST:
        return array, None
    text = pl.format(f"{name}: {{}} is not a finite number", numbers)
    return array, pl.select(pl.when(numbers.abs() > LARGEST).then(text)).to_series()


def float64(values: pa.Array) -> np.ndarray:
    """float64, NaN where a value is missing."""
    return values.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
