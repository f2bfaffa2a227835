"""Rows of a request to ids and numbers, as jobs.preprocess encodes a log."""

# Shapes: B rows, V values.

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError, did_you_mean
from features.fit.encoders import Encoders
from features.parse.convert import is_list
from features.schema.expressions import columns_of
from features.schema.schema import Schema
from pipeline.serving.direct import Direct, Plan
from pipeline.serving.encoded import Encoded
from pipeline.serving.exact import Exact
from pipeline.serving.given import Column, Given, Rows, plain, table_of, values_of
from pipeline.serving.row_error import RowError
from pipeline.serving.values import column_of

MOST_PLANS = 256
JSON_LINES = "jsonl"  # the format of logs whose rows have keys of their own
USER = "user"


class Requests:
    """Encodes requests: rows of candidates, and what is the same for all of them. Threads may share it.

    A column that a row lacks is missing, or what source.optional has for it, as in training; of a history or counter it is as
    with an empty past. None and null are missing values; of a log of JSON lines, whose rows may lack keys, they are as a column
    that is not there. Labels, outcomes, the weight, keys of splits and row ids are not needed; where they are given they are
    not read.

    Attributes:
        columns: that a row may have: raw ones, those that side tables and counters add, and histories (items, latest first).
    """

    def __init__(self, schema: Schema, encoders: Encoders) -> None:
        encoders = encoders.indexed()
        self.schema, self._encoders, self._exact = schema, encoders, Exact(schema, encoders)
        self._read = self._exact.columns()
        self.columns = list(self._read)
        self._absent = {name: self._exact.absent(name, 1)[0].as_py() for name in self.columns}
        in_place_of_null = self.columns if schema.source.format == JSON_LINES else []
        self._defaults = {name: text for name in in_place_of_null if (text := self._exact.default(name)) is not None}
        self._unread = {*schema.raw_columns, *(schema.source.columns or ()), *schema.source.optional}
        self._unread |= schema.outcome_columns.keys()
        self.direct = Direct(schema, encoders, self._exact, {name: read.kind for name, read in self._read.items()})
        self._plans: dict[tuple[frozenset[str], frozenset[str] | None], tuple[Plan, Plan, list[str]]] = {}

    def encode(
        self, rows: Rows, user: Mapping[str, Any] | None = None, where: str = "rows", extra: bool = False
    ) -> Encoded:
        """Encodes rows.

        Args:
            rows: a mapping each, or a table.
            user: columns that are the same for all rows. where: what the rows are called in errors.
            extra: ignore columns that the schema does not have, or computes.
        Raises:
            RowError: naming the row and the field.
            UserError: a column is given for rows and user both, or none that is read is there.
        """
        try:
            given = self._given(rows, extra)
        except RowError as error:
            raise error.at(error.row, where) from None
        same = Given({}, 1) if user is None else self._of_user(user, extra)
        names = frozenset(given.columns), frozenset(same.columns) if user is not None else None
        if both := sorted(names[0] & (names[1] or set())):
            raise UserError(f"{both[0]} is given in user and in {where}: leave it out of one of them")
        if given.rows and not (names[0] or names[1]):
            raise UserError(f"{where}: none has a column that is read, such as {', '.join(self.columns[:10])}")
        of_rows, of_user, mixed = self._plan(*names)
        try:
            parts = self.direct.encode(of_user, same).repeated(given.rows)
            given.columns |= {column: same.columns[column].repeated(column, given.rows) for column in mixed}
        except RowError as error:
            raise error.at(None, USER) from None
        try:
            parts.add(self.direct.encode(of_rows, given))
        except RowError as error:
            raise error.at(None, USER) if error.field in mixed else error.at(error.row, where) from None
        return parts.encoded(self.schema, given.rows)

    def warm_up(self, most: int = 1000) -> None:
        """Encodes the most frequent values of each vocabulary, which are then known."""
        for (_, table, _), memo in self.direct.memos.items():
            if self.schema.all_tables[table].counted:
                try:
                    memo.ids(self._encoders.vocabularies[table].slice(0, most))
                except RowError:  # a text that its column cannot have, as where others share the table
                    continue

    def describe(self) -> dict[str, dict[str, Any]]:
        """A JSON schema of each column, for OpenAPI: any may be left out, or null."""
        found = {}
        for name, read in self._read.items():
            features = [feature for feature, columns in self._exact.reads.items() if name in columns]
            types = ["number", "string"] if read.kind != "string" else ["string", "integer", "number", "boolean"]
            content: dict[str, Any] = {"type": [*types, "null"]}
            if read.separator:
                content = {"type": [*types, "array", "null"], "items": {"type": [*types, "null"]}}
            found[name] = content | {"description": f"Read by {', '.join(features)}."}
        return found

    def _of_user(self, user: Mapping[str, Any], extra: bool) -> Given:
        try:
            return self._given([user], extra)
        except RowError as error:
            raise error.at(None, USER) from None

    def _given(self, rows: Rows, extra: bool) -> Given:
        """The columns that are read of rows in any form."""
        if isinstance(rows, (pa.Table, pa.RecordBatch, pl.DataFrame)):
            table = table_of(rows)
            self._check_names(table.column_names, None, extra)
            arrays = {c: plain(table[c]) for c in table.column_names if c in self._read}
            return Given({c: Column(None, self._filled(c, array)) for c, array in arrays.items()}, table.num_rows)
        if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
            raise RowError(None, None, f"give a list of mappings or a table, not a {type(rows).__name__}")
        check = partial(self._check_names, extra=extra)
        found = {}
        for name, values in values_of(rows, self._absent, check).items():
            if name in self._defaults:
                values = [self._defaults[name] if value is None else value for value in values]
            make = partial(column_of, self._read[name], values)
            found[name] = Column(values, make=make)
        return Given(found, len(rows))

    def _filled(self, name: str, values: pa.Array) -> pa.Array:
        """A column with its default in the place of nulls, where a log has it there. Raises RowError."""
        if not values.null_count or (text := self._defaults.get(name)) is None:
            return values
        values = values.cast(pa.string()) if pa.types.is_null(values.type) else values
        default = text.split(self._read[name].separator) if is_list(values.type) else text
        try:
            return pc.fill_null(values, pa.scalar(default).cast(values.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            reason = f"is {values.type}, which cannot have {text!r} of source.optional in the place of nulls"
            raise RowError(None, name, reason) from None

    def _check_names(self, names: Iterable[str], row: int | None, extra: bool) -> None:
        """Raises RowError for a column that is not there, or is computed from others."""
        derived = self.schema.source.derived
        for name in names:
            if extra or name in self._read or name in self._unread:
                continue
            if name in derived:
                read = ", ".join(columns_of(derived[name]))
                raise RowError(row, name, f"is computed from {read}: give these in place of it")
            raise RowError(row, name, f"is no column of the schema{did_you_mean(name, self.columns)}")

    def _plan(self, rows: frozenset[str], user: frozenset[str] | None) -> tuple[Plan, Plan, list[str]]:
        """Plans of the features of rows and of the user, by the columns given; and the user's columns that the former read."""
        if (found := self._plans.get((rows, user))) is None:
            reads = self._exact.reads
            of_rows = [name for name, read in reads.items() if user is None or rows & {*read}]
            mixed = {column for name in of_rows for column in reads[name]} & (user or set())
            of_user = [name for name in reads if name not in {*of_rows}]
            found = self.direct.plan(of_rows), self.direct.plan(of_user), sorted(mixed)
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[rows, user] = found
        return found
