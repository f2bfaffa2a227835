"""Steps `scatter_past` and `gather_past`: histories and counters of earlier rows, a bucket of keys at a time."""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.join import counters, history
from features.join.known import Known
from features.join.places import key_codes
from features.kinds.canonical import canonical
from features.kinds.values import LARGEST, cleaned, of_keys
from features.parse import compute, raw
from features.schema.schema import Schema
from features.source import Counter, Format, History
from pipeline.ingest import shuffle
from pipeline.ingest.messages import GatherPastReport, GatherPastWork, PartWork, ScatterPastReport
from pipeline.ingest.state import Job
from pipeline.ingest.steps.join import joined, scatter
from pipeline.ingest.steps.look_up import part_rows
from pipeline.ingest.steps.past_state import earlier_events
from pipeline.ingest.steps.undecided import undecided

NEVER = np.iinfo(np.int64).min  # before all events, where an impression has no time
KEYS = of_keys(Format())  # what is missing in a key, though it may be an id in a feature of the same column


def scatter_past(job: Job, work: PartWork) -> ScatterPastReport:
    """Scatters a part's keys and events to the buckets of their keys, for each history and counter."""
    rows, schema = part_rows(job, work.index, work.part), job.schema
    outcomes = joined(job, work.index, work.part.rows)
    texts, columns = _reads(schema)
    frame = raw.view(schema, rows, outcomes, texts, columns)
    time = pl.Series(raw.event_time(schema, rows))
    known = Known(schema, time, outcomes, undecided(job, work.part.unit, rows, work.as_of).either)
    train = pl.Series(raw.split(schema, rows) == 0) if schema.smoothed else None
    paths, left_open, sums = {}, {}, {}
    for name, past in schema.past.items():
        events, open_ = (
            _history(name, past, frame, known) if isinstance(past, History) else _counter(name, past, frame, known)
        )
        if past.key not in schema.source.derived:
            events = events.with_columns(cleaned(events["key"], KEYS))
        if name in schema.smoothed:
            counts = events.filter(train & events["known"].is_not_null())["value"]
            sums[name] = (float(counts.sum()), len(counts))
        left_open[name] = int((open_ & events["key"].is_not_null()).sum())
        table = events.with_columns(time.alias("time"), pl.int_range(pl.len()).alias(shuffle.POSITION))
        paths[name] = scatter(job, table.rechunk().to_arrow(), "key")
    late = int((time < job.start.state.horizon).sum()) if job.start else 0
    ahead = 0 if job.horizon is None else int((time >= job.horizon).sum())
    return ScatterPastReport(paths, left_open, sums, time.min(), late, ahead)  # type: ignore[arg-type]


def _reads(schema: Schema) -> tuple[list[str], list[str]]:
    """The expressions and columns that all histories and counters read."""
    pasts = schema.past.values()
    return [text for past in pasts for text in past.expressions.values()], [c for past in pasts for c in past.columns]


def _history(name: str, past: History, frame: pl.DataFrame, known: Known) -> tuple[pl.DataFrame, pl.Series]:
    """The columns key, known (null: the row is no event) and item of a block; and whose part in it the log's end left open."""
    since, undecided = known.since([*past.expressions.values()])
    item = _texts(frame, past.item, f"bag.{name}.history.item")
    counts = item.is_not_null()
    if past.when:
        counts &= compute.truth(frame, f"bag.{name}.history.when", past.when)
    return pl.DataFrame(
        {"key": _texts(frame, past.user, f"bag.{name}.history.user"), "known": since.set(~counts, None), "item": item}
    ), undecided


def _counter(name: str, past: Counter, frame: pl.DataFrame, known: Known) -> tuple[pl.DataFrame, pl.Series]:
    """The same with the column value in place of item; a count has none."""
    since, undecided = known.since([*past.expressions.values()])
    counts = pl.Series([True], dtype=pl.Boolean).new_from_index(0, len(since))
    values = {}
    if past.when:
        counts = compute.truth(frame, f"source.counters.{name}.when", past.when)
    if past.of:
        value = compute.number(frame, f"source.counters.{name}.of", past.of, "value", pl.Float64)
        counts &= (value.abs() <= LARGEST).fill_null(False)
        values = {"value": value}
    key = _texts(frame, past.by, f"source.counters.{name}.by")
    return pl.DataFrame({"key": key, "known": since.set(~counts, None), **values}), undecided


def _texts(frame: pl.DataFrame, column: str, where: str) -> pl.Series:
    """A column's values as the texts by which ids compare. Raises UserError, naming `where`, for one that is no id."""
    return pl.Series(canonical(frame[column].rechunk().to_arrow(), f"{where}: column {column}"))


def gather_past(job: Job, work: GatherPastWork) -> GatherPastReport:
    """Makes the lists or numbers of a bucket, and the events that a later job needs of it."""
    name, past = work.name, job.schema.past[work.name]
    frame, sizes = shuffle.read_bucket([report.paths[name] for report in job.found(ScatterPastReport)], work.bucket)
    events = _events(past, frame)
    if (earlier := earlier_events(job, name, work.bucket)) is not None:
        events = pl.concat([earlier.select(events.columns), events])
    codes = key_codes(pl.concat([frame["key"], events["key"]]))
    key_I, key_E = codes[: frame.height], codes[frame.height :]
    time_I = frame["time"].fill_null(NEVER).to_numpy()
    if isinstance(past, History):
        length = job.schema.bag[name].max_length
        found = pl.Series(name, _lists(key_I, time_I, key_E, events, length))
        later = history.kept(events, work.horizon, length)
    else:
        found = pl.Series(name, counters.counted(past, key_I, time_I, events, key_E, work.mean)).fill_nan(None)
        later = counters.kept(past, events, work.horizon)
    columns = frame.select(shuffle.POSITION).with_columns(found)
    return GatherPastReport(
        name,
        shuffle.write_batches(job.temporary_path("gathered"), columns, sizes),
        shuffle.write(job.temporary_path("later"), [later.rechunk().to_arrow()]),
    )


def _events(past: History | Counter, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of a bucket that are events, with all columns of one."""
    events = frame.filter(pl.col("known").is_not_null() & pl.col("key").is_not_null())
    if isinstance(past, History):
        return events.select("key", "known", "item")
    value = pl.col("value") if past.of else pl.lit(1.0).alias("value")
    return events.select("key", "known", value, pl.lit(1.0).alias("weight"))


def _lists(key_I: np.ndarray, time_I: np.ndarray, key_E: np.ndarray, events: pl.DataFrame, length: int) -> pa.Array:
    """For each row the earlier items of its user."""
    offsets, event_V = history.recent(key_I, time_I, key_E, events["known"].to_numpy(), length)
    items = events["item"].gather(event_V).rechunk().to_arrow().cast(pa.large_string())
    return pa.LargeListArray.from_arrays(pa.array(offsets), items)


def found_past(job: Job, part: int, rows: int) -> tuple[dict[str, pa.Array], pl.DataFrame | None]:
    """The lists of each history for a part, and the columns of counters; None without counters."""
    columns: dict[str, Any] = {}
    for name in job.schema.past:
        paths = [report.path for report in job.found(GatherPastReport) if report.name == name]
        columns[name] = shuffle.gather(paths, part, rows)[name].combine_chunks()
    lists = {name: columns[name] for name in job.schema.histories}
    numbers = {name: pl.Series(columns[name]) for name in job.schema.source.counters}
    return lists, pl.DataFrame(numbers) if numbers else None
