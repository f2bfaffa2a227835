"""From raw columns to typed rows: casts, derived columns, labels and split of a block of rows at a time."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from features.errors import UserError
from features.hashing import hash_strings
from features.kinds import times
from features.kinds.canonical import as_ids
from features.kinds.values import WORDS, cleaned, coded, is_marker, numbers, of_keys
from features.parse import compute
from features.parse.kept import kept_columns
from features.parse.labels import labels, weights
from features.schema.expressions import columns_of
from features.schema.schema import SPLITS, HashSplit, RowIndexSplit, Schema
from features.source import Format, RawType
from features.time_units import is_format

LINE = "__line"  # of the row in its file, or in the part of it that is read at a time
ROW = "__row"  # index of the row there
ROW_ID = "row_id"
SPLIT = "__split"  # index into SPLITS
HASH_SPLIT_SEED = 7  # apart from the buckets of a hash table over the same column


@dataclass(frozen=True)
class Typed:
    """A block's columns with their types, good and bad rows separated.

    Attributes:
        rows: text that names ids as codes into its values, other text plain, numbers and times as they are; LINE and ROW.
        bad: the other rows, as dead letters: line, reason, raw.
    """

    rows: pa.Table
    bad: pl.DataFrame


@dataclass(frozen=True)
class Parsed:
    """A block's rows as features and labels.

    Attributes:
        rows: a column a feature and `label.TASK` (null = not observed), weight, event_time, row_id, SPLIT; see `parse`.
        bad: as of Typed.
        left_out: rows that a rule of the schema leaves out, by rule.
    """

    rows: pa.Table
    bad: pl.DataFrame
    left_out: dict[str, int] = field(default_factory=dict)


def type_columns(
    columns: pa.Table,
    types: dict[str, RawType],
    codes: set[str],
    form: Format,
    line: np.ndarray,
    row: int,
    keys: Collection[str] = (),
) -> Typed:
    """Types the raw columns of a block of an impressions' or outcomes' file.

    Args:
        columns: as they were read: text, numbers that the reader has parsed, or lists of text.
        types: of all columns.
        codes: text columns that are ids.
        form: how the file is written.
        line: of each row, for dead letters.
        row: index of the first row.
        keys: text columns that are keys, in which the usual missing markers are missing.
    """
    found: dict[str, pa.Array] = {}
    reason: pl.Series | None = None
    form_of_keys = of_keys(form)
    for name, kind in types.items():
        array, text_form = _one(columns[name]), form_of_keys if name in keys else form
        if kind == "time" or (kind != "string" and _is_text(array)):
            texts = cleaned(pl.Series(array, dtype=pl.String), form) if _is_text(array) else array
            values, wrong = times.seconds(name, texts, form) if kind == "time" else numbers(texts, kind)
            if _is_text(array) and wrong.any():
                wrong &= ~is_marker(texts)
            if wrong.any():
                texts = texts if isinstance(texts, pl.Series) else pl.Series(array.cast(pa.string()))
                words = pl.lit(_words(name, kind, form))
                text = pl.select(pl.when(wrong).then(pl.format("{}: '{}' is not {}", pl.lit(name), texts, words)))
                own = text.to_series()
                reason = own if reason is None else reason.zip_with(reason.is_not_null(), own)
            found[name] = values.to_arrow()
        elif kind != "string":
            found[name] = array.cast(pa.float64() if kind == "float" else pa.int64())
        elif not _is_text(array):  # a list
            found[name] = array
        elif name in codes:
            found[name] = coded(array, text_form)
        else:
            found[name] = cleaned(pl.Series(array, dtype=pl.String), text_form).to_arrow()
    found |= {LINE: pa.array(line), ROW: pa.array(np.arange(len(line)) + row)}
    clocks = {name for name, kind in types.items() if kind == "time" and pa.types.is_timestamp(columns[name].type)}
    fields = [pa.field(n, a.type, metadata=times.OWN_UNIT if n in clocks else None) for n, a in found.items()]
    rows = pa.table(list(found.values()), schema=pa.schema(fields))
    if reason is None:
        return Typed(rows, dead_letters())
    bad = reason.is_not_null()
    texts = pa.Table.from_pydict({name: columns[name] for name in types}).filter(bad.to_arrow())
    return Typed(rows.filter((~bad).to_arrow()), dead_letters(line[bad.to_numpy()], reason.filter(bad), as_json(texts)))


def _words(name: str, kind: RawType, form: Format) -> str:
    """What the values of a column should be."""
    unit = form.unit_of(name)
    if kind != "time":
        return WORDS[kind]
    return (
        f"a time of the form {unit}" if is_format(unit) else "a time (of other forms than ISO 8601: set source.times)"
    )


def dead_letters(line: Iterable[int] = (), reason: Iterable[str] = (), raw: Iterable[str] = ()) -> pl.DataFrame:
    """Dead letters: the line, the reason, and the row as text."""
    types = {"line": pl.Int64, "reason": pl.String, "raw": pl.String}
    return pl.DataFrame({"line": line, "reason": reason, "raw": raw}, schema=types)


def as_json(rows: pa.Table) -> pl.Series:
    """The cells that were read, as JSON, for a person to read."""
    frame: pl.DataFrame = pl.from_arrow(_decoded(rows))  # type: ignore[assignment]
    return frame.select(pl.struct(pl.all()).struct.json_encode().alias("raw")).to_series()


def code_columns(schema: Schema) -> set[str]:
    """The raw columns that are read as codes into their values: those of one id a row, and of items of a history."""
    return {raw.column for raw in schema.raw.values() if raw.coded} - schema.raw_types.keys()


def id_columns(schema: Schema) -> set[str]:
    """The raw columns that are text and name something, a value or a list a row: ids, users and items, keys."""
    used = [schema.raw[name].column for name in schema.sparse] + [history.user for history in schema.histories.values()]
    used += [table.foreign_key for table in schema.source.tables.values()]
    used += [counter.by for counter in schema.source.counters.values()]
    used += [key for key in (schema.source.key, getattr(schema.split, "key", None)) if key]
    return set(used) - schema.raw_types.keys() - schema.source.derived.keys()


def list_columns(schema: Schema) -> dict[str, str]:
    """The raw columns that may hold lists, with the separator of items where they hold text."""
    return {raw.column: raw.separator for raw in schema.raw.values() if raw.separator}


def view(
    schema: Schema, rows: pa.Table, joined: pl.DataFrame | None, expressions: Iterable[str], also: Iterable[str] = ()
) -> pl.DataFrame:
    """The columns that expressions read, and others by name: raw, derived or of outcomes.

    Raises:
        UserError: a derived column cannot be computed, or one of those by name holds lists.
    """
    frame = _view(schema, rows, joined, expressions, also)
    for name in also:
        if _is_nested(frame[name]):
            raise UserError(f"column {name} holds lists, but is used where a row needs one value: name another column")
    return frame


def _view(
    schema: Schema, rows: pa.Table, joined: pl.DataFrame | None, expressions: Iterable[str], also: Iterable[str]
) -> pl.DataFrame:
    wanted = {column for expression in expressions for column in columns_of(expression)} | set(also)
    derived = {name: text for name, text in schema.source.derived.items() if name in wanted}
    wanted |= {column for text in derived.values() for column in columns_of(text)}
    frame: pl.DataFrame = pl.from_arrow(_decoded(rows.select([c for c in rows.column_names if c in wanted])))  # type: ignore[assignment]
    if not frame.width:
        frame = pl.DataFrame({ROW: rows[ROW].to_numpy()})
    if joined is not None:
        frame = frame.hstack(joined.select(c for c in joined.columns if c in wanted))
    computed = compute.derived(frame, derived)
    return frame.with_columns(computed)


def parse(
    schema: Schema,
    rows: pa.Table,
    row_id: int,
    joined: pl.DataFrame | None = None,
    open_windows: dict[str, np.ndarray] | None = None,
    histories: dict[str, pa.Array] | None = None,
    absent: dict[str, np.ndarray] | None = None,
) -> Parsed:
    """Features, labels and split of typed rows; those that cannot be used become dead letters.

    Args:
        rows: B typed rows of `type_columns`, with the columns of side tables.
        row_id: added to ROW, it is the id of a row where the schema names no `row_id` column.
        joined: B rows of the columns that outcomes and counters add.
        open_windows: per outcome [B] whether its window was still open when the log ended.
        histories: per bag of a history, B lists of items.
        absent: per outcome [B] whether it may be in a file that is absent.
    Returns: of each feature a column of its name, as its kind parses it; label.TASK float32, weight float32, event_time
        int64, row_id int64, SPLIT int8; those of `Schema.kept`.
    """
    named = [*(raw.column for raw in schema.raw.values()), *schema.keep]
    added = [column for column in named if column in schema.added_columns]
    open_windows, histories, absent = open_windows or {}, histories or {}, absent or {}
    undecided = [*open_windows.items(), *absent.items()]
    frame = _view(schema, rows, joined, schema.expressions.values(), [*schema.source.derived, *added])
    columns, reasons = _features(schema, schema.features, frame, rows, histories)
    core = labels(schema, frame, undecided)
    core["weight"] = weights(schema, frame)
    core["event_time"] = _whole(schema, "event_time", schema.event_time, frame, rows, pl.Series(rows[ROW]) * 0)
    core[ROW_ID] = _whole(schema, "source.row_id", schema.source.row_id, frame, rows, pl.Series(rows[ROW]) + row_id)
    core[SPLIT] = _split(schema, frame, rows, core["event_time"])
    columns |= {name: series.rechunk().to_arrow() for name, series in core.items()}
    columns |= kept_columns(schema, rows.num_rows, lambda name: _column(schema, name, frame, rows))
    table = pa.table(columns)
    reason = _faults(schema, core, reasons.values(), rows.schema)
    if schema.source.outcomes:
        key = str(schema.source.key)
        missing = pl.Series(_arrow(_column(schema, key, frame, rows)).is_null())
        reason = _either(reason, missing, pl.lit(f"{key}: missing key"))
    bad = reason.is_not_null().to_numpy()
    keep, left_out = ~bad, {}
    for found_B, rule in ((open_windows, "window of {} still open"), (absent, "files of {} absent")):
        for name, undecided_B in found_B.items():
            if schema.source.outcomes[name].open_window == "leave_out":
                left_out[rule.format(name)] = int((undecided_B & keep).sum())
                keep &= ~undecided_B
    found = dead_letters()
    if bad.any():
        cells = as_json(rows.select(schema.raw_columns).filter(pa.array(bad)))
        found = dead_letters(rows[LINE].to_numpy()[bad], reason.filter(pl.Series(bad)), cells)
    return Parsed(table if keep.all() else table.filter(pa.array(keep)), found, left_out)


def features(
    schema: Schema,
    names: Iterable[str],
    rows: pa.Table,
    joined: pl.DataFrame | None = None,
    histories: Mapping[str, pa.Array] | None = None,
) -> tuple[dict[str, pa.Array], dict[str, pl.Series]]:
    """Some features of typed rows as `parse` returns them, and of those with dead letters the reasons, null for good rows.

    Args:
        names: of the features; of the columns only those that they read need be there. Others: see `parse`.
    """
    names, histories = list(names), histories or {}
    read = [schema.raw[name].column for name in names if name not in histories]
    made = schema.source.derived.keys() | schema.added_columns.keys()
    frame = _view(schema, rows, joined, (), [column for column in read if column in made])
    return _features(schema, names, frame, rows, histories)


def _features(
    schema: Schema, names: Iterable[str], frame: pl.DataFrame, rows: pa.Table, histories: Mapping[str, pa.Array]
) -> tuple[dict[str, pa.Array], dict[str, pl.Series]]:
    columns, reasons = {}, {}
    for name in names:
        values = histories[name] if name in histories else _column(schema, schema.raw[name].column, frame, rows)
        columns[name], reason = schema.features[name].parse(name, _arrow(values), schema)
        if reason is not None:
            reasons[name] = reason
    return columns, reasons


def column(schema: Schema, rows: pa.Table, name: str) -> pa.Array:
    """A raw or derived column of typed rows, ids as plain text. Raises UserError where it holds lists."""
    return _arrow(view(schema, rows, None, (), (name,))[name])


def event_time(schema: Schema, rows: pa.Table) -> pa.Array:
    """When each of typed rows happened, in whole seconds; null where that is missing or implausible.

    Raises:
        UserError: the column is of another type.
    """
    frame = view(schema, rows, None, (), (str(schema.event_time),))
    found = _whole(schema, "event_time", str(schema.event_time), frame, rows, pl.Series())
    return _arrow(times.plausible(found, schema.source.unit_of(schema.event_time)))


def split(schema: Schema, rows: pa.Table) -> np.ndarray:
    """The split of each of typed rows as an index into SPLITS, -1 where what decides it is missing."""
    keys = (schema.split.key,) if isinstance(schema.split, HashSplit) else ()
    time = pl.Series(event_time(schema, rows)) if schema.event_time else pl.Series()
    return _split(schema, _view(schema, rows, None, (), keys), rows, time).fill_null(-1).to_numpy()


def _is_nested(values: pl.Series | pa.Array) -> bool:
    """Whether a column has several values a row: lists or records."""
    return values.dtype.is_nested() if isinstance(values, pl.Series) else pa.types.is_nested(values.type)


def _column(schema: Schema, name: str, frame: pl.DataFrame, rows: pa.Table) -> pl.Series | pa.Array:
    return frame[name] if name in schema.source.derived or name in schema.added_columns else _one(rows[name])


def _arrow(values: pl.Series | pa.Array) -> pa.Array:
    return values if isinstance(values, pa.Array) else values.rechunk().to_arrow()


def _whole(
    schema: Schema, key: str, name: str | None, frame: pl.DataFrame, rows: pa.Table, default: pl.Series
) -> pl.Series:
    """A column of whole numbers, if the schema names one. Raises UserError where it is of another type."""
    if name is None:
        return default
    series = pl.Series(_column(schema, name, frame, rows))
    if not series.dtype.is_integer():
        cure = f"make it CAST(FLOOR(...) AS BIGINT) in source.derived.{name}"
        if name not in schema.source.derived:
            cure = f"set source.types: {{{name}: {'time' if key == 'event_time' else 'int'}}}"
        raise UserError(f"{key}: column {name} is {series.dtype}, it must be a whole number: {cure}")
    return compute.cast(series, key, pl.Int64)


def _split(schema: Schema, frame: pl.DataFrame, rows: pa.Table, time: pl.Series) -> pl.Series:
    split = schema.split
    if isinstance(split, RowIndexSplit):
        of_remainder = np.empty(split.modulo, np.int8)
        for number, name in enumerate(SPLITS):
            of_remainder[getattr(split, name)] = number
        return pl.Series(of_remainder[rows[ROW].to_numpy() % split.modulo])
    if isinstance(split, HashSplit):
        column = _column(schema, split.key, frame, rows)
        if _is_nested(column):
            raise UserError(f"split.key: column {split.key} holds lists: name one with one value a row")
        keys = as_ids(column, f"split.key: column {split.key}")
        share = hash_strings(keys.dictionary, HASH_SPLIT_SEED) / 2.0**64
        code = np.where(share < split.test, 2, np.where(share < split.test + split.valid, 1, 0)).astype(np.int8)
        return pl.Series(pa.array(code).take(keys.indices))
    valid_from, test_from = (math.ceil(moment.timestamp()) for moment in (split.valid_from, split.test_from))
    return (time >= valid_from).cast(pl.Int8) + (time >= test_from).cast(pl.Int8)


def _faults(schema: Schema, core: dict[str, pl.Series], found: Iterable[pl.Series], typed: pa.Schema) -> pl.Series:
    """Per row why it is a dead letter, null for a good one; of several reasons the first, and first those of features."""
    reason = pl.Series([None], dtype=pl.String).new_from_index(0, core[SPLIT].len())
    for own in found:
        reason = reason.zip_with(reason.is_not_null(), own)
    for name, task in schema.tasks.items():
        label = core[f"label.{name}"]
        allowed = label.is_between(0, 1) if task.kind == "binary" else label.is_finite()
        words = "a label in [0, 1]" if task.kind == "binary" else "a finite label"
        if task.transform == "log1p":
            allowed, words = allowed & (label > -1), "a finite label above -1, of which log1p is taken"
        reason = _either(reason, ~allowed, pl.format(f"tasks.{name}: {{}} is not {words}", label))
    weight = core["weight"]
    text = pl.format("weight: {} is not a number >= 0", weight.cast(pl.String).fill_null("missing"))
    reason = _either(reason, ~(weight.is_finite() & (weight >= 0)).fill_null(False), text)
    reason = _either(reason, core[SPLIT].is_null(), pl.lit("split: its key or time is missing"))
    if schema.event_time:
        reason = _either(reason, core["event_time"].is_null(), pl.lit(f"{schema.event_time}: missing event time"))
        time, unit = core["event_time"], schema.source.unit_of(schema.event_time)
        if (wrong := times.implausible(time, unit)) is not None:
            derived = schema.event_time in schema.source.derived
            own_unit = not derived and times.has_own_unit(typed.field(schema.event_time))
            why = times.implausible_reason(schema.event_time, time, unit, "source.times", derived, own_unit)
            reason = _either(reason, wrong, pl.lit(why))
    if column := schema.source.row_id:
        reason = _either(reason, core[ROW_ID].is_null(), pl.lit(f"{column}: missing row id"))
        # -1 marks the padding of a batch.
        reason = _either(reason, core[ROW_ID] < 0, pl.format(f"{column}: {{}} is not a row id >= 0", core[ROW_ID]))
    return reason


def _either(reason: pl.Series, wrong: pl.Series, text: pl.Expr) -> pl.Series:
    """The reasons, and `text` for rows that are wrong and have none yet."""
    if not wrong.any():
        return reason
    return pl.select(pl.when(reason.is_null() & wrong).then(text).otherwise(reason)).to_series()


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    return (
        column.chunk(0)
        if column.num_chunks == 1
        else column.combine_chunks()
        if column.num_chunks
        else pa.array([], column.type)
    )


def _decoded(rows: pa.Table) -> pa.Table:
    """Codes as the text they stand for."""
    for index, field_ in enumerate(rows.schema):
        if pa.types.is_dictionary(field_.type):
            rows = rows.set_column(index, field_.name, rows[field_.name].cast(pa.large_string()))
    return rows


def _is_text(array: pa.Array) -> bool:
    return pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_null(array.type)
