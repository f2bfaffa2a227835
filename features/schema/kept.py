"""Kept columns: values of raw, derived or added columns that a dataset holds as they are, for slices and keys of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from features.errors import did_you_mean
from features.schema.comparisons import column_types

if TYPE_CHECKING:
    from features.schema.schema import Schema

TEXT, WHOLE, NUMBER = pa.large_string(), pa.int64(), pa.float64()
ALLOWED = "allowed are columns of the log, derived ones, and those that outcomes, counters and side tables add"


def kept_column(name: str) -> str:
    """The column of a dataset that holds a kept column. No feature is called so: names of features have no dot."""
    return f"raw.{name}"


def kept_types(schema: Schema) -> dict[str, pa.DataType]:
    """The columns of a dataset that hold kept ones, with their types, in the order of `keep`; of an accepted schema."""
    if not schema.keep:
        return {}
    types = column_types(schema)
    found = {kept_column(name): _stored(types[name]) for name in schema.keep}
    return {column: kind for column, kind in found.items() if kind is not None}


def _stored(kind: pl.DataType) -> pa.DataType | None:
    """The type in which a dataset holds values of a type; None where it holds none."""
    if kind in (pl.String, pl.Null):
        return TEXT
    if kind in (pl.Boolean, pl.Date, pl.Datetime) or (kind.is_integer() and kind not in (pl.Int128, pl.UInt128)):
        return WHOLE
    return NUMBER if kind.is_float() or kind.is_decimal() else None


def faults_of_kept(schema: Schema) -> Iterator[str]:
    """Kept columns that do not exist, are listed twice, or have no single value of a type that a dataset holds."""
    keep, source = schema.keep, schema.source
    for name in sorted({name for name in keep if keep.count(name) > 1}):
        yield f"keep lists column {name} twice: remove one"
    added = {*source.derived, *schema.added_columns, *schema.table_columns}
    lists = {raw.column: feature for feature, raw in schema.raw.items() if raw.separator}
    types = column_types(schema) if keep else {}
    for name in dict.fromkeys(keep):
        if source.columns is not None and name not in added | {*source.columns}:
            near = did_you_mean(name, [*source.columns, *added])
            yield f"keep: there is no column {name}{near}, {ALLOWED}"
        elif name in schema.histories:
            yield f"keep: {name} is a feature made of earlier rows, a list and no column: {ALLOWED}"
        elif name in lists:
            yield f"keep: column {name} may hold lists, as feature {lists[name]} reads it: keep a column of one value a row"
        elif name not in types:
            yield (
                f"keep: the type of column {name} does not follow from the schema, as where it reads lists or computes with "
                f"text: CAST what source.derived.{name} reads, or keep another column"
            )
        elif _stored(types[name]) is None:
            yield f"keep: column {name} is {types[name]}, which is no text, number or time: CAST it in source.derived"
