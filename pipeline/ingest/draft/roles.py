"""Which stream holds the impressions, which others are their outcomes, and by which keys they belong together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl

from features.errors import UserError, did_you_mean
from pipeline.ingest.draft.column import Column, column_of, word_of
from pipeline.ingest.draft.moments import NAME
from pipeline.ingest.draft.sample import Sample

UNIQUE = 0.98  # share of different values in a key: logs that are delivered twice repeat some
MORE = 1.1  # times the rows, which are estimates
ALL = 0.95  # share of the impressions from which on a stream is about every one of them
FEW_MISSING = 0.0005  # of a key or time: more such rows, which are bad ones, stop jobs.preprocess
SAMPLED = 3  # files of a stream at most
DAY = 86_400
WINDOWS = (
    600,
    1800,
    3600,
    2 * 3600,
    3 * 3600,
    6 * 3600,
    12 * 3600,
    DAY,
    2 * DAY,
    3 * DAY,
    7 * DAY,
    14 * DAY,
    30 * DAY,
    90 * DAY,
)


@dataclass(frozen=True)
class Stream:
    """A stream with what its columns hold."""

    sample: Sample
    columns: dict[str, Column]

    @property
    def pattern(self) -> str:
        """Of its files."""
        return self.sample.group.pattern

    @property
    def times(self) -> list[Column]:
        """Columns of times."""
        return [column for column in self.columns.values() if column.kind == "time"]

    @cached_property
    def unique(self) -> list[Column]:
        """Columns of ids with another value in every row."""
        return [
            c
            for c in self.columns.values()
            if c.kind in ("int", "text") and c.missing < 0.01 and c.distinct >= UNIQUE * c.known
        ]


@dataclass(frozen=True)
class Outcomes:
    """A stream of later events.

    Attributes:
        name: of the outcome. key: its column that names the impression.
        matched: events of the sample whose impression is in the sample, too; of: all events of the sample.
        time: when it happened; None where no time is after that of the impressions.
        delays: in seconds from the impression, sorted, of those that match.
    """

    name: str
    stream: Stream
    key: Column
    matched: int
    of: int
    time: Column | None = None
    delays: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def window(self) -> int | None:
        """Seconds in which nearly all of them happen, rounded up; None where too few are seen."""
        if len(self.delays) < 20:
            return None
        most, last = float(np.quantile(self.delays, 0.99)), float(self.delays[-1])
        return next((w for w in WINDOWS if w >= (last if last <= 2 * most else most)), None)


@dataclass(frozen=True)
class Table:
    """A stream of rows of users, items or the like: a side table.

    Attributes:
        key: its column that names them. column: that of the impressions with the same values.
        files: as `files` of a schema has them; with {date} each file is a snapshot of the whole table.
        valid_from: of several rows a key, the time from which each is valid; None: one row a key.
    """

    stream: Stream
    key: Column
    column: Column
    files: str
    valid_from: Column | None = None


@dataclass(frozen=True)
class Roles:
    """What each stream is.

    Attributes:
        impressions: the stream of rows. key: what outcomes refer to; None without outcomes.
        event_time: of the impressions, where they have one.
        outcomes: by name.
        tables: streams of rows a value of an impressions' column: side tables.
        others: pattern and reason of streams that are not used.
        why: the evidence for the choice of impressions.
    """

    impressions: Stream
    key: Column | None
    event_time: Column | None
    outcomes: list[Outcomes]
    tables: list[Table]
    others: list[tuple[str, str]]
    why: str


def stream_of(sample: Sample) -> Stream:
    """A stream with what its columns hold."""
    trim = bool(sample.dialect.options.get("trim"))
    return Stream(sample, {name: column_of(name, values, trim) for name, values in sample.columns.items()})


def roles_of(streams: Sequence[Stream], impressions: str | None, key: str | None, event_time: str | None) -> Roles:
    """Assigns roles to streams by shared keys, numbers of rows and times.

    Args:
        impressions, key, event_time: a pattern and columns that are given; None: to be found.

    Raises:
        UserError: one that is given does not exist.
    """
    if impressions is not None:
        chosen = [stream for stream in streams if stream.pattern == impressions]
        if not chosen:
            near = did_you_mean(impressions, [stream.pattern for stream in streams])
            raise UserError(f"impressions={impressions}: no such stream{near}; there are {_listed(streams)}")
        first, why = chosen[0], "as given"
    else:
        first, why = _impressions(streams)
    others = [stream for stream in streams if stream is not first]
    named = None if key is None else column_named(first, key, "key")
    moment = _event_time(first, event_time)
    by_key = {c.name: linked for c in ([named] if named else first.unique) if (linked := _linked(first, c, others))}
    best = max(by_key, key=lambda name: len(by_key[name]), default=None)
    outcomes, used = list[Outcomes](), {id(first)}
    for stream, column, matched in by_key[best] if best else ():
        outcomes.append(_outcomes(first, first.columns[str(best)], moment, stream, column, matched, outcomes))
        used.add(id(stream))
    tables, unused = list[Table](), list[tuple[str, str]]()
    for stream in others:
        if id(stream) in used:
            continue
        if table := _side_table(first, stream, moment):
            tables.append(table)
        else:
            unused.append((stream.pattern, _why_unused(first, stream, moment)))
    found_key = named or (first.columns[best] if best else None)
    return Roles(first, found_key, moment, outcomes, tables, unused, why)


def column_named(stream: Stream, name: str, setting: str) -> Column:
    """A column that a setting names. Raises UserError where the stream does not have it."""
    if name not in stream.columns:
        raise UserError(
            f"{setting}={name}: no such column in {stream.pattern}{did_you_mean(name, stream.columns)}; there are "
            f"{', '.join(stream.columns)[:1000]}"
        )
    return stream.columns[name]


def _listed(streams: Sequence[Stream]) -> str:
    return ", ".join(stream.pattern for stream in streams)


def _impressions(streams: Sequence[Stream]) -> tuple[Stream, str]:
    """The stream that others refer to by a key of its own; of several the one with times, then the largest."""
    if len(streams) == 1:
        return streams[0], "the only stream"
    found = []
    for place, stream in enumerate(streams):
        others = [other for other in streams if other is not stream]
        # What a larger stream refers to is a table of its items or users.
        if any(
            other.sample.rows > MORE * stream.sample.rows and _refers(other, key)
            for other in others
            for key in stream.unique
        ):
            continue
        links = max((len(_linked(stream, key, others)) for key in stream.unique), default=0)
        found.append((links, bool(stream.times), stream.sample.rows, -place, stream))
    if not found:
        stream = max(streams, key=lambda each: each.sample.rows)
        return stream, "the stream of the most rows"
    links, _, _, _, stream = max(found, key=lambda each: each[:4])
    if links:
        return stream, f"{links} other stream{'s refer' if links > 1 else ' refers'} to its rows by a key"
    return stream, "the stream of the most rows that has times" if stream.times else "the stream of the most rows"


def _refers(stream: Stream, key: Column) -> bool:
    """Whether a column of a stream has the values of another one's key."""
    return any(_match(key, column) for column in stream.columns.values())


def _linked(first: Stream, key: Column, others: Sequence[Stream]) -> list[tuple[Stream, Column, int]]:
    """The streams that may be outcomes of rows with this key: their column and how many of its values match."""
    found = []
    for stream in others:
        matches = [(n, c) for c in stream.columns.values() if (n := _match(key, c))]
        if not matches or stream.sample.rows > MORE * first.sample.rows or _is_of_every_row(first, key, stream):
            continue
        matched, column = max(matches, key=lambda each: (each[1].word == key.word, each[0]))
        found.append((stream, column, matched))
    return found


def _match(key: Column, column: Column) -> int:
    """How many values of a column are values of a key; 0 where that may be chance.

    Samples of two streams need not be of the same rows: of columns of one name a few matches are enough.
    """
    # What is a time by its order alone may be ids that are given in turn.
    may_be_ids = column.kind in ("int", "text") or (column.kind == "time" and not NAME.search(column.word))
    if not may_be_ids or not column.known:
        return 0
    of = column.texts.unique()
    matched = int(of.is_in(key.texts.unique().implode()).sum())
    if column.word == key.word:
        return matched if matched >= min(5, len(of)) else 0
    long = bool((of.str.len_chars() >= 6).mean() > 0.9)  # type: ignore[operator]
    return matched if long and len(of) >= 20 and matched >= 0.5 * len(of) else 0


def _is_of_every_row(first: Stream, key: Column, stream: Stream) -> bool:
    """Whether a stream has a row for about every impression."""
    columns = [c for c in stream.unique if _match(key, c)]
    return bool(columns) and stream.sample.rows >= ALL * first.sample.rows


def _event_time(stream: Stream, given: str | None) -> Column | None:
    """The time of the rows: the one that is given, or of the columns without gaps the one that is named best."""
    if given is not None:
        column = column_named(stream, given, "event_time")
        if column.kind != "time":
            raise UserError(
                f"event_time={given}: its values are no times since 1990 and before 2100, such as "
                f"{', '.join(map(str, column.texts.head(3)))}. Name another column."
            )
        return column
    names = ("event_time", "timestamp", "ts", "time", "impression_time", "event_timestamp", "datetime", "date")
    fit = [c for c in stream.times if c.missing < FEW_MISSING and c.distinct > 1]
    return min(fit, key=lambda c: names.index(c.word) if c.word in names else len(names), default=None)


def _outcomes(
    first: Stream,
    key: Column,
    moment: Column | None,
    stream: Stream,
    column: Column,
    matched: int,
    before: Sequence[Outcomes],
) -> Outcomes:
    """A stream as outcomes, with its time where it comes after that of the impressions."""
    taken = {*first.columns, *(each.name for each in before)}
    name = outcome_name(stream.pattern)
    while name in taken or any(c.startswith(f"{name}_") and c in taken for c in added_names(name, stream)):
        name += "_event"
    best, delays = None, np.empty(0, np.int64)
    for time in stream.times:
        if moment is None or time is column:
            continue
        found = _delays(key, moment, column, time)
        if len(found) and (found >= 0).mean() > ALL:
            best, delays = time, np.sort(found[found >= 0])
            break
    return Outcomes(name, stream, column, matched, column.distinct, best, delays)


def added_names(name: str, stream: Stream) -> list[str]:
    """The columns that a join with a stream may add beside its name."""
    return [f"{name}_{suffix}" for suffix in ("count", "time", *stream.columns)]


def _delays(key: Column, moment: Column, column: Column, time: Column) -> np.ndarray:
    """Seconds from an impression to an event, of the events whose impression is in the sample."""
    assert moment.moments is not None
    assert time.moments is not None
    left = pl.DataFrame({"key": key.values.cast(pl.String), "at": moment.moments.seconds}).drop_nulls().unique("key")
    right = pl.DataFrame({"key": column.values.cast(pl.String), "then": time.moments.seconds}).drop_nulls()
    both = right.join(left, on="key")
    return (both["then"] - both["at"]).to_numpy()


def outcome_name(pattern: str) -> str:
    """A name for an outcome by its files: click for clicks-{date}.csv, order for orders/part-*.parquet."""
    for part in reversed(pattern.split("/")):
        stem = re.sub(r"(\.(csv|tsv|txt|jsonl?|ndjson|parquet|avro|gz|bz2|zst|snappy|log|dat))+$", "", part)
        stem = re.sub(r"(part|data|dt|date|day)?[-_.=]*(\{date\}|\*)", "", stem)
        word = word_of(stem)
        if word and not word[0].isdigit() and word not in ("part", "data"):
            if re.search(r"(sh|ch|x|ss)es$", word):
                return word[:-2]
            return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
    return "outcome"


def _side_table(first: Stream, stream: Stream, moment: Column | None) -> Table | None:
    """A stream as a table of users, items or the like, with one row a key, versions by time, or snapshots by day.

    Args:
        moment: the event time of the impressions, without which neither versions nor snapshots can be chosen among.
    """
    files, whole = stream.sample.group.files, stream.pattern.replace("{date}", "*")
    for key in stream.unique:
        if column := _refers_to(first, key):
            # Of several files with other keys none is the whole table.
            return Table(stream, key, column, whole if moment is None or len(files) > 1 else stream.pattern)
    if moment is None or (link := _repeated_key(first, stream)) is None:
        return None
    key, column = link
    if "{date}" in stream.pattern and key.known <= MORE * min(len(files), SAMPLED) * key.distinct:
        return Table(stream, key, column, stream.pattern)
    versions = {
        c.name: pl.DataFrame([key.values, c.values]).n_unique() for c in stream.times if c.missing < FEW_MISSING
    }
    best = max(versions, key=lambda name: versions[name], default=None)
    return None if best is None else Table(stream, key, column, whole, stream.columns[best])


def _refers_to(first: Stream, key: Column) -> Column | None:
    """The column of the impressions with the name and the values of a table's key, which is no key of theirs."""
    return next(
        (c for c in first.columns.values() if c.word == key.word and c.distinct < UNIQUE * c.known and _match(key, c)),
        None,
    )


def _repeated_key(first: Stream, stream: Stream) -> tuple[Column, Column] | None:
    """The key of a table with several rows of each, and the column of the impressions; None where it refers to single ones.

    Of several columns that both have, the one with the most values: others, such as a country, are what the rows say.
    """
    if _row_key(first, stream):
        return None
    keys = [c for c in stream.columns.values() if c.kind in ("int", "text") and c.missing < FEW_MISSING]
    links = [(key, column) for key in keys if (column := _refers_to(first, key))]
    return max(links, key=lambda link: link[0].distinct, default=None)


def _row_key(first: Stream, stream: Stream) -> Column | None:
    """The key of single impressions that a stream refers to."""
    return next((key for key in first.unique if any(_match(key, c) for c in stream.columns.values())), None)


def _why_unused(first: Stream, stream: Stream, moment: Column | None) -> str:
    if key := _row_key(first, stream):
        if _is_of_every_row(first, key, stream):
            return (
                "has a row for about every impression: an outcome has some, and what it holds may be known only later"
            )
        return "refers to the impressions by another key, or has more rows than they have"
    if link := _repeated_key(first, stream):
        lacks = "the impressions have no event_time" if moment is None else "no time from which each is valid"
        return f"has several rows with one {link[0].name}, but {lacks}: which of them an impression sees is not known"
    return "no column has the values of a key of the impressions"
