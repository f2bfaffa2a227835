"""Checks across the keys of a schema: names that clash, columns that are missing, labels among the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import polars as pl

from features.errors import did_you_mean
from features.kinds import KINDS, times
from features.kinds.values import WORDS, cleaned, numbers
from features.printable import has_controls, printable
from features.schema.comparisons import mixed_comparisons
from features.schema.expressions import columns_of
from features.schema.kept import faults_of_kept
from features.schema.past_checks import contradictions_of_the_past
from features.schema.splits import HashSplit, TimeSplit
from features.schema.table_checks import keys_of_tables, side_tables, table_inputs
from features.schema.task import given_chain
from features.source import Format, RawType, outcome_names
from features.time_units import DEFAULT, INDEX

if TYPE_CHECKING:
    from features.schema.schema import Schema

RESERVED = ("weight", "event_time", "row_id")  # columns of every dataset
MAX_NAME_BYTES = 200  # bytes in UTF-8: with an ending it still names a file
MAX_COLUMN_BYTES = 1000  # the same of a raw column and of files, whose names somebody else chose


def contradictions(schema: Schema) -> Iterator[str]:
    """What is wrong between keys that are each valid by themselves."""
    if unfit := list(_unfit_names(schema)):
        yield from unfit
        return
    for key, expression in schema.expressions.items():
        try:
            columns_of(expression)
        except ValueError as error:
            yield f"{key}: {error}"
            return
    if unfit := list(_unfit_columns(schema)):
        yield from unfit
        return
    yield from _nested(schema)
    if schema.source.outcomes and not schema.source.key:
        yield "source.key is missing: outcomes need the column of the impressions that they refer to"
    if isinstance(schema.split, TimeSplit) and not schema.event_time:
        yield "event_time is missing: a split by time needs it"
    yield from _without_time(schema)
    yield from _added_twice(schema)
    yield from _names(schema)
    for name, feature in schema.features.items():
        yield from feature.contradictions(name, schema)
    for table in schema.tables.keys() - {f.table for f in schema.sparse.values()}:
        yield f"tables.{table} is used by no feature: remove it, or write table: {table} in one"
    if schema.source.columns is not None:
        for column in schema.raw_columns:
            if column not in schema.source.columns and column not in schema.keep:
                known = [*schema.source.columns, *schema.outcome_columns, *schema.source.derived]
                yield f"column {column} is used, but source.columns does not list it{did_you_mean(column, known)}"
    yield from _unread(schema)
    yield from _units(schema)
    yield from _optional(schema)
    yield from _keys_of_outcomes(schema)
    yield from side_tables(schema)
    yield from contradictions_of_the_past(schema)
    yield from faults_of_kept(schema)
    yield from mixed_comparisons(schema)
    yield from _tasks(schema)
    yield from _leaks(schema)


def _tasks(schema: Schema) -> Iterator[str]:
    """Losses and transforms that do not fit a task's kind, and conditions on tasks that do not exist."""
    for name, task in schema.tasks.items():
        if task.kind == "binary" and (own := task.model_fields_set & {"loss", "transform"}):
            key = min(own)
            yield f"tasks.{name}.{key}: a binary task has none, its loss is the cross-entropy. Remove it."
        if task.loss.name == "ziln" and task.transform != "none":
            yield f"tasks.{name}.transform: the loss ziln takes the logarithm itself. Remove it."
        if task.given is None:
            continue
        binary = [other for other, found in schema.tasks.items() if found.kind == "binary" and other != name]
        if task.given not in binary:
            allowed = f"allowed are {', '.join(binary)}" if binary else "and there is no other binary task"
            yield f"tasks.{name}.given: {task.given} is not another binary task{did_you_mean(task.given, binary)}, {allowed}"
        elif task.kind != "binary":
            yield f"tasks.{name}.given: a regression task is observed where observed_when is true. Write that instead."
        elif name in given_chain(schema.tasks, task.given):
            yield f"tasks.{name}.given: {name} and {task.given} are given each other. Remove one of the two."


def _nested(schema: Schema) -> Iterator[str]:
    """Derived columns that read derived columns."""
    for name, expression in schema.source.derived.items():
        if nested := [c for c in columns_of(expression) if c in schema.source.derived]:
            yield f"source.derived.{name} reads {nested[0]}, which is derived itself: write it from raw columns"


def _unfit_names(schema: Schema) -> Iterator[str]:
    """Names that the schema gives and that are empty, too long, control a terminal, or lead out of a folder of files."""
    sections = {section: getattr(schema, section) for section in [*KINDS, "tables", "tasks"]}
    source = schema.source
    sections |= {
        "source.derived": source.derived,
        "source.outcomes": source.outcomes,
        "source.counters": source.counters,
        "source.tables": source.tables,
    }
    forbidden = dict.fromkeys([*KINDS, "tables"], "./\\")  # a module's name has no dot
    forbidden |= dict.fromkeys(["source.outcomes", "source.counters", "source.tables"], "/\\")
    for section, names in sections.items():
        for name in names:
            yield from _unfit(f"name in {section}", name, MAX_NAME_BYTES, forbidden.get(section, ""))
            if not name:
                yield f"{section}: a name is empty"


def _unfit_columns(schema: Schema) -> Iterator[str]:
    """Raw columns and files that the schema names and whose names are too long or control a terminal."""
    source, outcomes = schema.source, schema.source.outcomes.values()
    columns = [*(source.columns or ()), *source.types, *schema.raw_columns]
    for outcome in outcomes:
        columns += [outcome.key, *outcome.types, *((outcome.read and outcome.read.columns) or ())]
    columns += keys_of_tables(schema)
    for column in dict.fromkeys(columns):
        yield from _unfit("column", column, MAX_COLUMN_BYTES)
    files_of = [*(outcome.files for outcome in outcomes), *(table.files for table in source.tables.values())]
    for files in dict.fromkeys([source.files, *files_of]):
        yield from _unfit("files", files, MAX_COLUMN_BYTES)


def _unfit(what: str, name: str, limit: int, forbidden: str = "") -> Iterator[str]:
    if has_controls(name):
        yield f"{what} {_shown(name)} has a control character: rename it"
    elif (length := len(name.encode())) > limit:
        yield f"{what} {_shown(name)} has {length} bytes, more than {limit}: shorten it"
    elif {*forbidden} & {*name}:
        yield f"{what} {_shown(name)} cannot name a file: rename it without {' '.join(forbidden)}"


def _shown(name: str) -> str:
    return f"'{printable(name if len(name) <= 60 else name[:60] + '…')}'"


def _names(schema: Schema) -> Iterator[str]:
    """Names of features and tables that clash."""
    features = [(name, f) for section in KINDS for name, f in getattr(schema, section).items()]
    names = [column for name, feature in features for column in feature.fields(name)]
    if twice := {n for n in names if names.count(n) > 1}:
        yield f"feature {min(twice)} is defined twice: {', '.join(KINDS)} share one namespace"
    for name in dict.fromkeys([*names, *schema.tables]):
        if name in RESERVED:
            yield f"feature {name} has the name of a column of every dataset: rename it, with column: {name}"


def _unread(schema: Schema) -> Iterator[str]:
    """Columns in `times` and `optional` that nothing reads, such as mistyped ones."""
    source = schema.source
    read: dict[str, tuple[Format, set[str]]] = {"source": (source, {*schema.raw_columns, *source.derived})}
    streams = {name: {o.key, *o.types} for name, o in source.outcomes.items()}
    streams |= {name: {table.key, *table.types} for name, table in source.tables.items()}
    for name, columns in streams.items():
        key = source.format_key(name)
        read[key] = (source.format_of(name), read.get(key, (source, set()))[1] | columns)
    for key, (form, columns) in read.items():
        for setting, named in (("times", form.times), ("optional", form.optional)):
            for column in named.keys() - columns:
                yield f"{key}.{setting}: column {column} is not read{did_you_mean(column, columns)}: fix or remove it"


def _optional(schema: Schema) -> Iterator[str]:
    """Columns that files may lack, though every row needs them, or whose value in their place is none of their type."""
    source = schema.source
    needed = {"source": [source.key, source.row_id, schema.event_time]}
    types: dict[str, dict[str, RawType]] = {"source": schema.raw_types}
    forms: dict[str, Format] = {"source": source}
    for name, outcome in source.outcomes.items():
        key = source.format_key(name)
        needed[key] = [*needed.get(key, ()), outcome.key, outcome.time]
        types[key] = types.get(key, {}) | outcome.types
        forms[key] = source.format_of(name)
    for name, table in source.tables.items():
        key = source.format_key(name)
        needed[key] = [*needed.get(key, ()), table.key, table.valid_from]
        types[key] = types.get(key, {}) | table.types
        forms[key] = source.format_of(name)
    for key, form in forms.items():
        for column, default in form.optional.items():
            kind = types[key].get(column, "string")
            if column in needed[key]:
                yield f"{key}.optional: every row needs column {column}: remove it"
            elif default is not None and kind != "string" and not _is_valid(column, str(default), kind, form):
                yield f"{key}.optional.{column}: {default!r} is not {WORDS[kind]}, as the column is"


def _is_valid(column: str, text: str, kind: RawType, form: Format) -> bool:
    texts = cleaned(pl.Series([text]), form)
    _, wrong = times.seconds(column, texts, form) if kind == "time" else numbers(texts, kind)
    return not wrong.any()


def _units(schema: Schema) -> Iterator[str]:
    """Columns that have a unit of time and are read as something else, or are computed."""
    source = schema.source
    for column, unit in source.times.items():
        if column in source.derived and unit not in (DEFAULT, INDEX):
            yield f"source.times.{column}: it is derived: make it whole seconds there, or write {INDEX} for a plain order"
    typed: dict[str, tuple[Format, dict[str, RawType]]] = {"source": (source, source.types)}
    typed |= {f"source.outcomes.{name}": (source.format_of(name), o.columns) for name, o in source.outcomes.items()}
    typed |= {f"source.tables.{name}": (source.format_of(name), t.columns) for name, t in source.tables.items()}
    for key, (form, types) in typed.items():
        for column in form.times.keys() & {c for c, kind in types.items() if kind != "time"}:
            yield f"{key}: column {column} is {types[column]}, and has a unit of time in `times`: make it time, or remove one"


def _keys_of_outcomes(schema: Schema) -> Iterator[str]:
    """Columns that identify, order or split impressions, but are known only once outcomes are joined."""
    keys: dict[str, str | None] = {
        "source.key": schema.source.key,
        "source.row_id": schema.source.row_id,
        "event_time": schema.event_time,
        "split.key": schema.split.key if isinstance(schema.split, HashSplit) else None,
    }
    for key, used in keys.items():
        if used and (later := sorted(schema.roots_of([used]) & schema.outcome_columns.keys())):
            yield f"{key} reads {later[0]}, which an outcome adds: it must be a column of the impressions"


def _leaks(schema: Schema) -> Iterator[str]:
    """Features that read an outcome or a label."""
    counters = schema.source.counters
    for name, raw in schema.raw.items():
        history = schema.histories.get(name)
        inputs = schema.roots_of([raw.column, history.user] if history else [raw.column])
        # What a row's counter is looked up by is an input, too; what it counts is of other rows.
        inputs |= schema.roots_of(counters[column].by for column in inputs & counters.keys())
        inputs |= schema.roots_of(table_inputs(schema, inputs))
        if later := sorted(inputs & schema.outcome_columns.keys()):
            yield f"feature {name} reads {later[0]}, an outcome that is known only after the impression. Remove it."
        for task, spec in schema.tasks.items():
            if answer := sorted(inputs & schema.roots_of(columns_of(spec.label))):
                yield (
                    f"tasks.{task}.label uses column {answer[0]}, which is also read by the feature {name}: "
                    "a model would see its answer. Remove one of the two."
                )


def _added_twice(schema: Schema) -> Iterator[str]:
    """Columns of expressions that two parts of the schema add."""
    outcomes = schema.source.outcomes.items()
    added = [c for name, o in outcomes for c in outcome_names(name, o)]
    added += [f"{name}_{column}" for name, table in schema.source.tables.items() for column in table.columns]
    added += [*schema.source.counters, *schema.source.derived]
    for column in sorted({c for c in added if added.count(c) > 1}):
        yield (
            f"column {column} is added twice, by source.outcomes, tables, counters or derived: rename one, or a column of an "
            "outcome or table"
        )


def _without_time(schema: Schema) -> Iterator[str]:
    """Outcomes that need an event time, and lack it."""
    for name, stream in schema.source.outcomes.items():
        if stream.time and not schema.event_time:
            yield f"event_time is missing: outcome {name} has a time, which is compared with it"
