"""Checks of a schema's side tables: names, what their key may be, and features that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from features.schema.schema import Schema

STREAM_OF_IMPRESSIONS = "impressions"


def side_tables(schema: Schema) -> Iterator[str]:
    """What is wrong with side tables beside other parts of the schema, and with names that two streams have."""
    source = schema.source
    for section, names in (("outcomes", source.outcomes), ("tables", source.tables)):
        for name in names:
            if name == STREAM_OF_IMPRESSIONS or (section == "tables" and name in source.outcomes):
                yield f"source.{section}.{name} has the name of another stream, such as an outcome: rename it"
    later = schema.added_columns.keys() | schema.table_columns.keys()
    for name, table in source.tables.items():
        if table.valid_from and not schema.event_time:
            yield f"event_time is missing: side table {name} has valid_from, which is compared with it"
        if added := sorted(schema.roots_of([table.foreign_key]) & later):
            yield (
                f"source.tables.{name} looks up {added[0]}, which an outcome, counter or side table adds: write by: "
                "with a column of the impressions"
            )
    keys = {"source.key": source.key, "source.row_id": source.row_id, "event_time": schema.event_time}
    for key, used in keys.items():
        if used and (found := sorted(schema.roots_of([used]) & schema.table_columns.keys())):
            yield f"{key} reads {found[0]}, which a side table adds: it must be a column of the impressions"
    yield from _numbers_of_text(schema)


def _numbers_of_text(schema: Schema) -> Iterator[str]:
    """Features of numbers that read a text column of a side table."""
    for feature, raw in schema.raw.items():
        if raw.type == "string" or raw.column not in schema.table_columns:
            continue
        name = schema.table_columns[raw.column]
        column = raw.column[len(name) + 1 :]
        if schema.source.tables[name].columns[column] == "string":
            yield (
                f"feature {feature} reads {raw.column} as a number, but it is text: write "
                f"source.tables.{name}.columns.{column}: {raw.type}"
            )


def table_inputs(schema: Schema, columns: Iterable[str]) -> list[str]:
    """The columns of the impressions by which those of side tables among `columns` are looked up: they show its value."""
    return [schema.source.tables[schema.table_columns[c]].foreign_key for c in columns if c in schema.table_columns]


def keys_of_tables(schema: Schema) -> list[str]:
    """The columns that the files of side tables are to have."""
    found: list[str] = []
    for table in schema.source.tables.values():
        found += [table.key, *table.columns, *([table.valid_from] if table.valid_from else [])]
        found += (table.read and table.read.columns) or []
    return found
