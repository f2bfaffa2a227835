"""The schema of a draft as YAML, section by section, with the reason of each guess as its comment."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from features.schema.table_checks import STREAM_OF_IMPRESSIONS
from pipeline.ingest.draft.column import MARKERS, Column
from pipeline.ingest.draft.config import DraftConfig
from pipeline.ingest.draft.division import Division, span_of
from pipeline.ingest.draft.document import Document, scalar
from pipeline.ingest.draft.features import Features, unfit_name
from pipeline.ingest.draft.labels import Label, sql_name
from pipeline.ingest.draft.roles import DAY, Outcomes, Roles, Stream, Table, added_names, outcome_name
from pipeline.ingest.files import is_local

ORDER = ("dense", "categorical", "bag", "vector")
HOUR = 3600
TYPES = {"int": "int", "float": "float", "text": "string"}


def written(
    config: DraftConfig,
    roles: Roles,
    tasks: Sequence[Label],
    features: Features,
    division: Division,
    others: Sequence[tuple[str, str]],
) -> Document:
    """The whole file."""
    page, first = Document(), roles.impressions
    page.remark(
        0, "A draft by jobs.draft: each guess has its reason beside it. Read it, correct it, delete what is not meant."
    )
    page.remark(0, f"Sampled: {first.sample.height:,} of about {first.sample.rows:,} impressions.")
    page.entry(0, "input", _folder(config.input))
    page.section(0, "schema")
    hour = _hour(roles, features)
    _source(page, roles, tasks, hour)
    if features.tables:
        page.section(1, "tables")
        for name, (settings, why) in features.tables.items():
            page.entry(2, name, settings, why)
    for section in ORDER:
        found = [feature for feature in features.found if feature.section == section]
        if found or (section == "categorical" and hour):
            page.section(1, section)
        for feature in found:
            page.entry(2, feature.name, feature.settings, feature.why)
        if section == "categorical" and hour:
            page.entry(2, hour[0], {"dim": 8}, "the hour of the day, derived above")
    _tasks(page, roles, tasks)
    if roles.event_time:
        moments = roles.event_time.moments
        page.entry(1, "event_time", roles.event_time.name, moments.words if moments else None)
    page.entry(1, "split", division.settings, division.why)
    if roles.key:
        page.entry(1, "keep", [roles.key.name], "so that a prediction says of which row it is")
    _left_out(page, roles, features, others)
    return page


def _folder(text: str) -> str:
    """The input folder, so that the file can be used from anywhere."""
    return str(Path(text).absolute()) if "://" not in text and is_local(text) else text


def _source(page: Document, roles: Roles, tasks: Sequence[Label], hour: tuple[str, str] | None) -> None:
    first = roles.impressions
    page.section(1, "source")
    page.entry(2, "files", first.pattern, f"the impressions, {_files(first)}: {roles.why}")
    options = source_options(first, roles)
    for key, value in options.items():
        page.entry(2, key, value, first.sample.dialect.why.get(key) or _why_option(key, first))
    numbers = {name: kind for task in tasks for name, kind in task.numbers.items()}
    if numbers:
        page.entry(2, "types", numbers, "read by labels as numbers")
    if roles.key and roles.outcomes:
        page.entry(2, "key", roles.key.name, f"another value in {roles.key.distinct:,} of {roles.key.known:,} rows")
    if roles.outcomes:
        page.section(2, "outcomes")
        for outcome in roles.outcomes:
            _outcome(page, roles, outcome, options)
    if roles.tables:
        _tables(page, roles, options)
    if hour:
        page.entry(2, "derived", {hour[0]: hour[1]}, "UTC")


def source_options(stream: Stream, roles: Roles) -> dict[str, Any]:
    """How the files of a stream are written, as keys of `source` or of `read`."""
    options = dict(stream.sample.dialect.options)
    if markers := sorted({marker for column in stream.columns.values() for marker in column.markers}):
        options["missing"] = ["", *markers]
    if times := {
        c.name: c.moments.unit for c in stream.times if c.moments and not c.moments.is_default and _is_read(c, roles)
    }:
        options["times"] = times
    return options


def _is_read(column: Column, roles: Roles) -> bool:
    """Whether a column of times is the event time, of an outcome, or of the versions of a side table."""
    others = [*(outcome.time for outcome in roles.outcomes), *(table.valid_from for table in roles.tables)]
    return column is roles.event_time or any(column is time for time in others)


def _why_option(key: str, stream: Stream) -> str | None:
    if key == "missing":
        return f"found among the values; searched for: {' '.join(MARKERS)}"
    if key == "times":
        return "; ".join(
            f"{c.name} has {c.moments.words}" for c in stream.times if c.moments and not c.moments.is_default
        )
    return None


def _files(stream: Stream) -> str:
    files = stream.sample.group.files
    return f"{len(files):,} file{'s' * (len(files) > 1)}, about {stream.sample.rows:,} rows"


def _outcome(page: Document, roles: Roles, outcome: Outcomes, options: dict[str, Any]) -> None:
    stream, event_time = outcome.stream, roles.event_time
    matched = f"{outcome.matched:,} of {outcome.of:,} sampled values of {outcome.key.name} are values of the key"
    page.section(3, outcome.name, f"{_files(stream)}; {matched}")
    page.entry(4, "files", stream.pattern)
    page.entry(4, "key", outcome.key.name)
    columns, left_out = outcome_columns(roles, outcome)
    if columns:
        page.entry(4, "columns", columns, f"seen in expressions as {outcome.name}_{next(iter(columns))} and so on")
    for name, why in left_out.items():
        page.remark(4, f"{scalar(name)} is left out: it {why}")
    if outcome.time:
        moments = outcome.time.moments
        page.entry(4, "time", outcome.time.name, moments.words if moments else None)
        if window := outcome.window:
            later = f"of {len(outcome.delays):,} seen the last came {_duration(int(outcome.delays[-1]))} after its impression"
            page.entry(4, "window", _duration(window), f"later ones do not count; {later}")
            if window > 0.1 * span_of(event_time):
                page.entry(4, "open_window", "keep", "the log is short beside the window: most would have no label yet")
    elif any(time is not outcome.key for time in stream.times):
        page.remark(4, "it has times, but none that follows those of the impressions: no time and window")
    for key, own in _read(stream, roles, options).items():
        page.entry(4, key, own, "its files are written otherwise than those of the impressions")


def _read(stream: Stream, roles: Roles, options: dict[str, Any]) -> dict[str, Any]:
    """The key `read` of an outcome or side table, where its files are not written as those of the impressions."""
    own = source_options(stream, roles)
    return {"read": own or {"format": "csv"}} if _differs(own, options, stream) else {}


def _differs(own: dict[str, Any], options: dict[str, Any], stream: Stream) -> bool:
    """Whether the files of another stream cannot be read as those of the impressions; what only these have does no harm."""
    inherited = {key: value for key, value in options.items() if key not in ("columns", "missing", "times")}
    times = {c: unit for c, unit in options.get("times", {}).items() if c in stream.columns}
    missing = {*own.get("missing", ())} <= {*options.get("missing", [""])}
    rest = {key: value for key, value in own.items() if key not in ("missing", "times")}
    return rest != inherited or own.get("times", {}) != times or not missing


def outcome_columns(roles: Roles, outcome: Outcomes) -> tuple[dict[str, str], dict[str, str]]:
    """The columns of an outcome with their types, and why others are left out."""
    columns, left_out = dict[str, str](), dict[str, str]()
    for name, column in outcome.stream.columns.items():
        if column in (outcome.key, outcome.time):
            continue
        if why := unfit_name(name):
            left_out[name] = why
        elif name in roles.impressions.columns:
            left_out[name] = "is a column of the impressions, too"
        elif name in ("count", "time") or column.kind not in TYPES:
            left_out[name] = (
                f"is {'a time' if column.kind == 'time' else 'a list' if column.kind != 'empty' else 'empty'}"
            )
        else:
            columns[name] = TYPES[column.kind]
    return columns, left_out


def _duration(seconds: int) -> str:
    """Seconds as a window is written, rounded up."""
    for unit, size in (("d", DAY), ("h", HOUR), ("m", 60)):
        if seconds >= size and (seconds % size == 0 or seconds >= 2 * size):
            return f"{-(-seconds // size)}{unit}"
    return f"{seconds}s"


def _tables(page: Document, roles: Roles, options: dict[str, Any]) -> None:
    """Side tables, as comments: whether what they hold was known at the impression is for a person to decide."""
    page.remark(
        2, "rows of users, items and the like, by a key that the impressions refer to; features could read NAME_COLUMN:"
    )
    found: dict[str, Any] = {}
    taken = {
        *roles.impressions.columns,
        *(c for each in roles.outcomes for c in [each.name, *added_names(each.name, each.stream)]),
    }
    for table in roles.tables:
        columns, lists = _table_columns(table)
        if lists:
            page.remark(
                2,
                f"{scalar(table.files)}: to be added with a bag or vector that reads it: {', '.join(map(scalar, lists))}",
            )
        if not columns:
            page.remark(2, f"{scalar(table.files)} is left out: it has no column of one value a row beside its key")
            continue
        name = outcome_name(table.stream.pattern)
        while name in {*found, STREAM_OF_IMPRESSIONS, *(each.name for each in roles.outcomes)} or taken & _named(
            name, columns
        ):
            name += "_table"
        taken |= _named(name, columns)
        by = {} if table.key.name == table.column.name else {"by": table.column.name}
        since = {"valid_from": table.valid_from.name} if table.valid_from else {}
        read = _read(table.stream, roles, options)
        found[name] = {"files": table.files, "key": table.key.name, **by, "columns": columns, **since, **read}
    if found:
        page.suggestion(2, "tables", found)


def _named(name: str, columns: Iterable[str]) -> set[str]:
    """The columns that a side table adds."""
    return {f"{name}_{column}" for column in columns}


def _table_columns(table: Table) -> tuple[dict[str, str], list[str]]:
    """The columns of a side table with their types, and those of lists, which only a bag or a vector can read."""
    kinds = {**TYPES, "list": "string", "numbers": "string"}
    fit = [
        c
        for c in table.stream.columns.values()
        if c not in (table.key, table.valid_from) and c.kind in kinds and not unfit_name(c.name)
    ]
    lists = [c.name for c in fit if c.values.dtype == pl.List and c.separator is None]
    return {c.name: kinds[c.kind] for c in fit if c.name not in lists}, lists


def _hour(roles: Roles, features: Features) -> tuple[str, str] | None:
    """A derived column for the hour of the day, with its expression, where the log has times of more than a day."""
    taken = {*roles.impressions.columns, *features.tables, *(feature.name for feature in features.found)}
    if roles.event_time is None or span_of(roles.event_time) < DAY or "hour" in taken:
        return None
    return "hour", f"CAST(FLOOR({sql_name(roles.event_time.name)} / 3600) % 24 AS BIGINT)"


def _tasks(page: Document, roles: Roles, tasks: Sequence[Label]) -> None:
    page.section(1, "tasks")
    for task in tasks:
        page.entry(2, _task_name(task.name), {"kind": task.kind, "label": task.expression}, task.why)
    names = {_task_name(task.name) for task in tasks}
    binary = {each.name: each.name if each.name not in names else f"{each.name}_outcome" for each in roles.outcomes}
    names |= {*binary.values()}
    for outcome in roles.outcomes:
        name = binary[outcome.name]
        why = "1 where one came" + " within its window" * bool(outcome.window)
        page.entry(2, name, {"kind": "binary", "label": sql_name(outcome.name)}, why)
        for column, kind in outcome_columns(roles, outcome)[0].items():
            if kind == "string":
                continue
            values = outcome.stream.columns[column].values.drop_nulls()
            label = sql_name(f"{outcome.name}_{column}")
            label = f"LN(1 + {label})" if len(values) and values.min() >= 0 else label  # type: ignore[operator]
            more = {"kind": "regression", "label": label, "observed_when": sql_name(outcome.name)}
            suggested = _task_name(column)
            while suggested in names:
                suggested = f"{outcome.name}_{suggested}"
            names.add(suggested)
            page.suggestion(2, suggested, more)


def _task_name(column: str) -> str:
    return re.sub(r"\s+", "_", column)[:100]


def _left_out(page: Document, roles: Roles, features: Features, others: Sequence[tuple[str, str]]) -> None:
    """Comments at the end: columns and files that the draft does not use."""
    named = {task for task in features.left_out if not features.left_out[task].startswith("is the ")}
    if named:
        page.remark(0, "Columns of the impressions that are no features:")
        for name in sorted(named, key=list(features.left_out).index):
            page.remark(0, f"  {scalar(name)} {features.left_out[name]}")
    unread = roles.impressions.sample.left_out
    for name, why in unread.items():
        page.remark(0, f"  {scalar(name)}: {why}")
    if roles.others or others:
        page.remark(0, "Files that are not used:")
        for pattern, why in [*roles.others, *others]:
            page.remark(0, f"  {scalar(pattern)} {why}")
