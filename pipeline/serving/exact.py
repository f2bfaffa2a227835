"""Features of a request's columns, by the functions that read logs: the one definition of what a value means."""

# Shapes: B rows, V items of all lists.

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.fit.encoders import Encoders
from features.join import counters
from features.kinds import times
from features.kinds.canonical import canonical
from features.kinds.values import as_lists
from features.parse import raw
from features.parse.convert import convert_columns, is_list
from features.schema.expressions import columns_of
from features.schema.schema import Schema
from features.source import Format, RawType
from pipeline.serving.encoded import Parts
from pipeline.serving.row_error import RowError
from pipeline.serving.values import MAX_BYTES, Reading, check_lengths

Columns = Mapping[str, pa.Array]


class Exact:
    """Encodes some features of columns as a log has them.

    A column is a raw one of the log, one that a side table or a counter adds (named as expressions name it), or the items of a
    history, under its bag's name.

    Attributes:
        reads: of each feature the columns that it is computed from. ids: the columns whose values, or items, are ids.
    """

    def __init__(self, schema: Schema, encoders: Encoders) -> None:
        self.schema, self.encoders = schema, encoders
        self.reads = {name: _reads(schema, name) for name in schema.features}
        self._codes, self.ids = raw.code_columns(schema), raw.id_columns(schema) | schema.histories.keys()
        keys = {schema.source.key, *(table.foreign_key for table in schema.source.tables.values())}
        self._keys = {key for key in keys if key and key not in schema.raw_types}

    def columns(self) -> dict[str, Reading]:
        """All columns that features are computed from, with how they are read."""
        schema, derived = self.schema, self.schema.source.derived
        separators = raw.list_columns(schema) | {name: schema.bag[name].separator for name in schema.histories}
        found = {}
        for name, columns in self.reads.items():
            in_expression = name not in schema.histories and schema.raw[name].column in derived
            for column in columns:
                kind, form = self._kind(column), schema.source.format_of(schema.table_columns.get(column))
                # An expression may read lists of any column of text.
                separator = separators.get(column) or ("|" if in_expression and kind == "string" else None)
                form = Format() if column in schema.histories or column in schema.source.counters else form
                if column not in found or separator:
                    found[column] = Reading(column, kind, separator, column in self.ids, form)
        return found

    def absent(self, column: str, rows: int) -> pa.Array:
        """The values of a column that is not given: missing, or as `optional` has it; of a counter those of an empty past."""
        if counter := self.schema.source.counters.get(column):
            mean, nothing = self.encoders.counter_means.get(column), np.zeros(0, np.int64)
            events = pl.DataFrame(schema=counters.EVENT)
            found = counters.counted(counter, np.ones(1, np.int64), np.zeros(1, np.int64), events, nothing, mean)
            return pa.array(found.repeat(rows))
        default = self.default(column)
        return pa.nulls(rows) if default is None else pa.repeat(pa.scalar(default, pa.string()), rows)

    def default(self, column: str) -> str | None:
        """The text of a raw column where a row of a log lacks it, if the schema has one."""
        found = None if column in self._added else self.schema.source.optional.get(column)
        return None if found is None else str(found)

    @property
    def _added(self) -> set[str]:
        """The columns that are in no file of the impressions."""
        return {*self.schema.table_columns, *self.schema.source.counters, *self.schema.histories}

    def encode(self, names: Sequence[str], columns: Columns, rows: int) -> Parts:
        """Features of B rows.

        Args:
            columns: of all that the features read, of any type of Arrow.
        Raises:
            RowError: a value that a log could not have, or would have among its dead letters, or too large a one.
        """
        for column in {column for name in names for column in self.reads[name]}:
            check_size(column, columns[column])
        try:
            return self._encode(names, columns, rows)
        except RowError:
            raise
        except UserError as error:
            raise self._blamed(names, columns, rows) or RowError(None, None, str(error)) from None

    def _encode(self, names: Sequence[str], columns: Columns, rows: int) -> Parts:
        used = list(dict.fromkeys(column for name in names for column in self.reads[name]))
        typed, joined, histories = self._typed({column: columns[column] for column in used}, rows)
        parsed, reasons = raw.features(self.schema, names, typed, joined, histories)
        for name, reason in reasons.items():
            if (bad := reason.is_not_null()).any():
                row = int(bad.arg_max() or 0)
                field = self._field(name)
                made = field != self.schema.raw[name].column and name not in self.schema.histories
                raise RowError(row, field, reason[row] if made else reason[row].removeprefix(f"{name}: "))
        found: dict[str, pa.Array] = {}
        for name in names:
            found |= self.schema.features[name].encode(name, parsed[name], self.encoders)
        return Parts.of(pa.table(found), self.schema, names)

    def _typed(self, columns: Columns, rows: int) -> tuple[pa.Table, pl.DataFrame, dict[str, pa.Array]]:
        """Typed rows with the columns of side tables, those of counters, and the lists of histories."""
        schema, streams = self.schema, dict[str | None, dict[str, pa.Array]]()
        for name, values in columns.items():
            if name not in schema.source.counters and name not in schema.histories:
                streams.setdefault(schema.table_columns.get(name), {})[name] = values
        typed = self._of_stream(None, streams.pop(None, {}), rows)
        self._check_time(typed)
        for table, added in streams.items():
            for name, values in zip(added, self._of_stream(table, added, rows).columns, strict=False):
                nested = is_list(values.type)
                typed = typed.append_column(name, values.cast(pa.large_list(pa.large_string())) if nested else values)
        numbers = {name: self._number(name, columns[name]) for name in columns if name in schema.source.counters}
        lists = {name: self._history(name, columns[name]) for name in columns if name in schema.histories}
        return typed, pl.DataFrame(numbers), lists

    def _of_stream(self, table: str | None, columns: Columns, rows: int) -> pa.Table:
        """Typed columns of the impressions, or of a side table, in the given order."""
        prefix = 0 if table is None else len(table) + 1
        form, own = self.schema.source.format_of(table), {name[prefix:]: name for name in columns}
        types = {column: self._kind(name) for column, name in own.items()}
        ids = {column for column, name in own.items() if name in self.ids and types[column] == "string"}
        codes, keys = (self._codes, self._keys) if table is None else (set[str](), set[str]())
        found = convert_columns("request", {c: columns[name] for c, name in own.items()}, types, form, ids)
        return _typed(found, types, codes, form, rows, keys, own)

    def _kind(self, column: str) -> RawType:
        if table := self.schema.table_columns.get(column):
            return self.schema.source.tables[table].columns[column[len(table) + 1 :]]
        if column in self.schema.source.counters:
            return "float"
        return "string" if column in self.schema.histories else self.schema.raw_types.get(column, "string")

    def _number(self, name: str, values: pa.Array) -> pl.Series:
        """A counter's column."""
        types: dict[str, RawType] = {name: "float"}
        found = convert_columns("request", {name: values}, types, Format())
        typed = _typed(found, types, set(), Format(), len(values), (), {name: name})
        return pl.Series(typed[name]).fill_nan(None)

    def _history(self, name: str, values: pa.Array) -> pa.Array:
        """The items of a history as texts: read as the column that they are of is read, without missing ones."""
        bag, item = self.schema.bag[name], self.schema.histories[name].item
        if pa.types.is_null(values.type):
            values = values.cast(pa.large_list(pa.large_string()))
        if not is_list(values.type):
            values = convert_columns("request", {name: values}, {name: "string"}, Format())[name].combine_chunks()
            values = as_lists(values, bag.separator)
        lists = values.cast(pa.large_list(values.type.value_type))
        length_B, items_V = pc.list_value_length(lists).fill_null(0).to_numpy(), lists.flatten()
        if is_list(items_V.type):
            raise UserError(f"column {name} holds lists of lists: its items are ids")
        if item in self.schema.source.derived:
            found = convert_columns("request", {name: items_V}, {name: "string"}, Format(), {name})
        else:
            try:
                found = self._of_stream(self.schema.table_columns.get(item), {item: items_V}, len(items_V))
            except RowError as error:
                row = int(np.searchsorted(np.cumsum(length_B), error.row or 0, side="right"))
                raise RowError(row, name, f"item {error.reason}") from None
        texts_V = canonical(found.column(0).combine_chunks(), f"bag.{name}: column {name}")
        return pa.LargeListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(length_B)]).astype(np.int64)), texts_V
        )

    def _check_time(self, typed: pa.Table) -> None:
        """Raises RowError where the event time is no time of a log: of such rows derived columns would be wrong."""
        name = self.schema.event_time
        if name is None or name not in typed.column_names:
            return
        values, unit = pl.Series(typed[name]), self.schema.source.unit_of(name)
        wrong = times.implausible(values, unit)
        if wrong is None or not (wrong := wrong & ~values.is_between(times.EARLIEST, times.LATEST)).any():
            return
        own_unit = times.has_own_unit(typed.field(name))
        reason = times.implausible_reason(name, values, unit, "source.times", False, own_unit)
        row = int(wrong.arg_max() or 0)
        raise RowError(row, name, reason[row].removeprefix(f"{name}: "))

    def _field(self, feature: str) -> str:
        """The column to name where a feature's value is wrong."""
        return self.reads[feature][0] if len(self.reads[feature]) == 1 else self.schema.raw[feature].column

    def _blamed(self, names: Sequence[str], columns: Columns, rows: int) -> RowError | None:
        """The first row of the first feature that cannot be encoded alone; None where none is."""
        for name in names:
            own = {column: columns[column] for column in self.reads[name]}

            def fault(first: int, count: int, name: str = name, own: Columns = own) -> UserError | None:
                try:
                    self._encode([name], {c: values.slice(first, count) for c, values in own.items()}, count)
                except UserError as error:
                    return error
                return None

            if fault(0, rows):
                return self._first(fault, name, rows)
        return None

    def _first(self, fault: Callable[[int, int], UserError | None], name: str, rows: int) -> RowError | None:
        first = 0
        while rows > 1:
            half = rows // 2
            if fault(first, half):
                rows = half
            else:
                first, rows = first + half, rows - half
        field, error = self._field(name), fault(first, rows)
        if error is None or isinstance(error, RowError):
            return error and error.at(first)
        return RowError(first, field, str(error).split(f"column {field} ", 1)[-1])


def check_size(column: str, values: pa.Array) -> None:
    """Raises RowError where a text has more than MAX_BYTES, or a list more than MAX_ITEMS."""
    if is_list(values.type):
        length_B = pc.list_value_length(values).fill_null(0).to_numpy()
        check_lengths(column, length_B)
        row_V, values = np.repeat(np.arange(len(length_B)), length_B), values.flatten()
    else:
        row_V = np.arange(len(values))
    if values.nbytes > MAX_BYTES and (_is_text(values.type) or pa.types.is_binary(values.type)):
        bytes_V = pc.binary_length(values).fill_null(0).to_numpy()
        if bytes_V.max(initial=0) > MAX_BYTES:
            row = int(row_V[bytes_V.argmax()])
            raise RowError(row, column, f"has a text of {bytes_V.max():,} bytes, allowed are {MAX_BYTES:,}")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _typed(
    found: pa.Table,
    types: dict[str, RawType],
    codes: set[str],
    form: Format,
    rows: int,
    keys: Iterable[str],
    own: Mapping[str, str],
) -> pa.Table:
    """`type_columns` where every row is good. own: the request's names of the columns. Raises RowError."""
    typed = raw.type_columns(found, types, codes, form, np.arange(rows), 0, set(keys))
    if typed.bad.height:
        row, reason = typed.bad.row(0)[:2]
        column = max((c for c in types if reason.startswith(f"{c}: ")), key=len)
        raise RowError(row, own[column], reason.removeprefix(f"{column}: "))
    return typed.rows


def _reads(schema: Schema, name: str) -> list[str]:
    """The columns of a request that a feature is computed from."""
    if name in schema.histories:
        return [name]
    column = schema.raw[name].column
    return columns_of(schema.source.derived[column]) if column in schema.source.derived else [column]
