"""Rows of a request to ids and numbers, as jobs.preprocess encodes a log."""

# Shapes: B rows.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa

from features.errors import UserError, did_you_mean
from features.fit.encoders import Encoders
from features.parse.raw import list_columns
from features.schema.expressions import columns_of
from features.schema.schema import Schema
from pipeline.serving.encoded import Encoded, Parts
from pipeline.serving.exact import Exact
from pipeline.serving.row_error import RowError
from pipeline.serving.values import column_of

Rows: TypeAlias = pa.Table | pa.RecordBatch | pl.DataFrame | Sequence[Mapping[str, Any]]


class Requests:
    """Encodes requests: rows of candidates, and what is the same for all of them.

    A column that a row lacks is missing, as in training; of a history or counter it is as with an empty past. Labels, outcomes,
    the weight, keys of splits and row ids are not needed; where they are given they are not read.

    Attributes:
        columns: that a row may have: raw ones, those that side tables and counters add, and histories (items, latest first).
    """

    def __init__(self, schema: Schema, encoders: Encoders) -> None:
        self.schema, self._exact = schema, Exact(schema, encoders)
        self._types = self._exact.columns
        self.columns = list(self._types)
        self._lists = list_columns(schema) | {name: schema.bag[name].separator for name in schema.histories}
        in_expressions = {
            c for name, read in self._exact.reads.items() if schema.raw[name].column not in read for c in read
        }
        self._lists |= dict.fromkeys(in_expressions - self._lists.keys() - schema.raw_types.keys(), "|")
        self._unread = {
            *schema.raw_columns,
            *(schema.source.columns or ()),
            *schema.source.optional,
            *schema.outcome_columns,
        }

    def encode(
        self, rows: Rows, user: Mapping[str, Any] | None = None, where: str = "rows", extra: bool = False
    ) -> Encoded:
        """Encodes rows.

        Args:
            rows: a mapping each, or a table; None and null are missing values.
            user: columns that are the same for all rows. where: what the rows are called in errors.
            extra: ignore columns that the schema does not have.
        Raises:
            RowError: naming the row and the field.
            UserError: a column is given for rows and user both, or none that is read is there.
        """
        found = self._given(rows, where, extra)
        same = self._given([user], "user", extra) if user is not None else Given({}, 1)
        if both := sorted(found.columns.keys() & same.columns.keys()):
            raise UserError(f"{both[0]} is given in user and in {where}: leave it out of one of the two")
        if found.rows and not (found.columns or same.columns):
            raise UserError(
                f"{where}: no column that a feature is computed from: it has {', '.join(self.columns[:20])}"
            )
        of_user = [
            name
            for name, read in self._exact.reads.items()
            if user is not None and not found.columns.keys() & set(read)
        ]
        of_rows = [name for name in self.schema.features if name not in set(of_user)]
        parts = self._parts(of_user, same, "user").repeated(found.rows)
        mixed = {column for name in of_rows for column in self._exact.reads[name]} & same.columns.keys()
        zeros = pa.array(np.zeros(found.rows, np.int64))
        found.columns |= {column: same.columns[column].take(zeros) for column in mixed}
        parts.add(self._parts(of_rows, found, where))
        return parts.encoded(self.schema, found.rows)

    def _parts(self, names: Sequence[str], given: "Given", where: str) -> Parts:
        used = {column for name in names for column in self._exact.reads[name]}
        columns = {c: given.columns.get(c) if c in given.columns else self._exact.absent(c, given.rows) for c in used}
        try:
            return self._exact.encode(names, columns, given.rows)
        except RowError as error:
            raise error.at(error.row if where != "user" else None, where) from None

    def _given(self, rows: Rows, where: str, extra: bool) -> "Given":
        """The columns that are read of rows in any form."""
        if isinstance(rows, pl.DataFrame):
            rows = rows.to_arrow()
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        try:
            return self._of_table(rows, extra) if isinstance(rows, pa.Table) else self._of_mappings(rows, extra)
        except RowError as error:
            raise error.at(error.row if where != "user" else None, where) from None

    def _of_table(self, rows: pa.Table, extra: bool) -> "Given":
        names = rows.column_names
        if len(set(names)) < len(names):
            raise RowError(None, None, f"column {next(n for n in names if names.count(n) > 1)} is there twice")
        self._check_names(names, None, extra)
        return Given({n: rows[n].combine_chunks() for n in names if n in self._types}, rows.num_rows)

    def _of_mappings(self, rows: Sequence[Mapping[str, Any]], extra: bool) -> "Given":
        names: dict[str, None] = {}
        for row, each in enumerate(rows):
            if not isinstance(each, Mapping):
                raise RowError(row, None, f"is no mapping of columns to values, but a {type(each).__name__}")
            if each.keys() - names.keys():
                self._check_names(each, row, extra)
                names |= dict.fromkeys(each)
        found = {}
        for name in names:
            if name in self._types:
                default = self._absent_value(name)
                values = [row.get(name, default) for row in rows]
                if (text := self._exact.default(name)) is not None:
                    values = [text if value is None else value for value in values]
                found[name] = column_of(name, values, self._types[name], self._lists.get(name))
        return Given(found, len(rows))

    def _absent_value(self, name: str) -> float | None:
        """What a row that lacks a column has in it, where others have it."""
        return self._exact.absent(name, 1)[0].as_py() if name in self.schema.source.counters else None

    def _check_names(self, names: Iterable[Any], row: int | None, extra: bool) -> None:
        for name in names:
            if name in self._types or name in self._unread or (extra and name not in self.schema.source.derived):
                continue
            if name in self.schema.source.derived:
                read = ", ".join(columns_of(self.schema.source.derived[name]))
                raise RowError(row, str(name), f"is computed from {read}: leave it out, and give these")
            near = did_you_mean(str(name), self.columns)
            raise RowError(row, str(name), f"is no column of the schema{near}")

    def describe(self) -> dict[str, dict[str, Any]]:
        """A JSON schema of each column, for OpenAPI: any may be left out, or null."""
        found = {}
        for name, kind in self._types.items():
            features = [feature for feature, read in self._exact.reads.items() if name in read]
            types = ["number", "string"] if kind != "string" else ["string", "integer", "number", "boolean"]
            content: dict[str, Any] = {"type": [*types, "null"]}
            if name in self._lists:
                content = {"type": [*types, "array", "null"], "items": {"type": [*types, "null"]}}
            found[name] = content | {"description": f"read by {', '.join(features)}"}
        return found


@dataclass
class Given:
    """Columns of B rows that are read, each of the type in which it was given."""

    columns: dict[str, pa.Array]
    rows: int
