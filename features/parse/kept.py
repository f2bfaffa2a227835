"""The kept columns of a block of rows, in the types in which a dataset holds them."""

from collections.abc import Callable

import polars as pl
import pyarrow as pa

from features.errors import UserError
from features.kinds.canonical import as_text
from features.parse import compute
from features.schema.kept import TEXT, WHOLE, kept_column
from features.schema.schema import Schema


def kept_columns(schema: Schema, rows: int, column: Callable[[str], pl.Series | pa.Array]) -> dict[str, pa.Array]:
    """The columns of `Schema.kept` for a block: text, whole numbers, other numbers, and times as seconds since 1970.

    Args:
        rows: of the block.
        column: gives a raw, derived or added column by name; one that is not read, as of rows without labels, is null.
    Raises:
        UserError: a column holds lists, or numbers that int64 does not hold.
    """
    read = {kept_column(name): name for name in schema.keep}
    return {
        name: _stored(read[name], column(read[name]), kind) if name in read else pa.nulls(rows, kind)
        for name, kind in schema.kept.items()
    }


def _stored(name: str, values: pl.Series | pa.Array, kind: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array) else values.rechunk().to_arrow()
    if pa.types.is_nested(array.type):
        raise UserError(f"keep: column {name} holds lists: keep a column of one value a row")
    if kind == TEXT:
        return (array if pa.types.is_dictionary(array.type) else as_text(array)).cast(TEXT)
    series = pl.Series(array)
    if series.dtype in (pl.Date, pl.Datetime):
        series = series.dt.epoch("s")
    if series.dtype.is_float():
        series = series.fill_nan(None)
    found = compute.cast(series, f"keep: column {name}", pl.Int64 if kind == WHOLE else pl.Float64)
    return found.rechunk().to_arrow()
