"""Categorical: one id a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import polars as pl
import pyarrow as pa
from pydantic import model_validator

from features.errors import UserError
from features.kinds.base import Feature, Layout, Raw
from features.kinds.canonical import as_ids
from features.kinds.tables import Table
from features.kinds.values import finite_numbers, float64

if TYPE_CHECKING:
    from features.fit.encoders import Encoders
    from features.fit.statistics import Statistics
    from features.schema.schema import Schema


class Categorical(Table, Feature):
    """One id a row. It has a table of its own name unless `table` names a shared one."""

    section: ClassVar[str] = "categorical"
    layout: ClassVar[Layout] = "id"

    column: str | None = None
    table: str | None = None

    @model_validator(mode="after")
    def _shared_table_decides(self) -> Categorical:
        own = self.model_fields_set & {"dim", "vocabulary", "hash", "bins", "managed"}
        if self.table and own:
            raise ValueError(f"{', '.join(sorted(own))} belong to the shared table {self.table}: set them there")
        return self

    def raw(self, name: str, schema: Schema) -> Raw:
        """A number where its table is one of bins, else text."""
        return Raw(self.column or name, "float" if self.binned(schema) else "string", coded=True)

    def parse(self, name: str, values: pa.Array, schema: Schema) -> tuple[pa.Array, pl.Series | None]:
        """To float64 where its table is one of bins, else to codes into text."""
        column = f"categorical.{name}: column {self.column or name}"
        if self.binned(schema):
            return finite_numbers(name, values, column)
        if pa.types.is_nested(values.type):
            raise UserError(f"{column} holds lists: make it a bag")
        return as_ids(values, column), None

    def count(self, name: str, values: pa.Array, schema: Schema, statistics: Statistics) -> None:
        """Counts values, or groups of them where there is no vocabulary to fit."""
        if self.binned(schema):
            statistics.add_numbers(schema.table_of(name), statistics.count_number(name, values))
            return
        found = statistics.count_values(name, values, hashed=not schema.table(name).counted)
        statistics.missing[name] = len(values) - found

    def fields(self, name: str) -> dict[str, pa.DataType]:
        return {name: pa.int64()}

    def encode(self, name: str, values: pa.Array, encoders: Encoders) -> dict[str, pa.Array]:
        table = encoders.schema.table_of(name)
        if self.binned(encoders.schema):
            return {name: pa.array(encoders.bins(table, float64(values)))}
        return {name: encoders.ids(table, values)}

    def contradictions(self, name: str, schema: Schema) -> Iterator[str]:
        if self.table and self.table not in schema.tables:
            yield f"{name}.table is {self.table}, allowed are {sorted(schema.tables)} (see tables)"
        elif not self.table and name in schema.tables:
            yield f"feature {name} has its own table, but tables.{name} exists: write table: {name}, or rename one"

    def binned(self, schema: Schema) -> bool:
        """Whether it is a number, looked up by bins."""
        table = schema.tables.get(self.table) if self.table else self
        return bool(table and table.bins)
