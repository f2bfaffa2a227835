"""Joins and histories: keys of a part's rows go to buckets, and what is found there comes back in the order of the rows."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.errors import UserError
from features.join.history import recent
from features.join.outcomes import join
from features.parse import raw
from features.schema.schema import Schema
from features.schema.source import RawType
from pipeline.ingest import shuffle
from pipeline.ingest.state import Job, Work


def key_type(schema: Schema) -> RawType:
    """As what keys are read and compared, on both sides of a join."""
    return schema.raw_types.get(str(schema.source.key), "string")


def send_keys(job: Job, rows: pa.Table) -> str:
    """Deals keys and times of impressions to buckets. Raises UserError for a derived key that has fractions."""
    schema = job.schema
    key = pl.Series(raw.column(schema, rows, str(schema.source.key)))
    fractions = key.dtype.is_numeric() and not key.dtype.is_integer()
    if fractions and key_type(schema) == "string":  # its text would be 1.0, which no outcome says
        raise UserError(f"source.key: {schema.source.key} is {key.dtype}: make it whole with CAST(... AS BIGINT)")
    if key_type(schema) == "string":
        key = key.cast(pl.String)
    sent = {"key": key.to_arrow(), shuffle.PLACE: pa.array(np.arange(rows.num_rows))}
    return send(job, pa.table(sent | ({"time": raw.event_time(schema, rows)} if schema.event_time else {})), "key")


def send(job: Job, table: pa.Table, key: str) -> str:
    """Deals rows to buckets by a column."""
    bucket_B = shuffle.bucket_of(table[key].combine_chunks(), job.buckets)
    return shuffle.write(job.aside("sent"), shuffle.partition(table, bucket_B, job.buckets))


def _bucket(paths: Iterable[str], bucket: int) -> tuple[pl.DataFrame, list[int]]:
    """What all parts sent to a bucket, in their order, and how many rows each."""
    tables = [shuffle.read(path, bucket, mapped=False) for path in paths]
    return pl.from_arrow(pa.concat_tables(tables)), [table.num_rows for table in tables]  # type: ignore[return-value]


def _reply(job: Job, frame: pl.DataFrame, sizes: Sequence[int]) -> str:
    """A batch for each part."""
    table, ends = frame.rechunk().to_arrow(), np.cumsum(sizes)
    return shuffle.write(
        job.aside("reply"), [table.slice(stop - size, size) for stop, size in zip(ends, sizes, strict=True)]
    )


def join_bucket(job: Job, work: Work) -> Work:
    """Joins all outcomes in a bucket: {bucket} to {path, join_statuses, latest} (time of the last joined one) per outcome."""
    bucket, join_statuses, latest = work["bucket"], {}, {}
    keys, sizes = _bucket((part["keys"] for part in job.parts()), bucket)
    joined = keys.select(shuffle.PLACE)
    for name, outcome in job.schema.source.outcomes.items():
        events, _ = _bucket((part["path"] for part in job.parts(name)), bucket)
        found = join(name, outcome, keys, events.select([outcome.key, *outcome.types]))
        joined, join_statuses[name], latest[name] = joined.hstack(found.columns), found.join_statuses, found.latest
    return {"join_statuses": join_statuses, "latest": latest, "path": _reply(job, joined, sizes)}


def joined(job: Job, part: int, rows: int) -> pl.DataFrame | None:
    """The columns that outcomes add to a part."""
    paths = [report["path"] for report in job.found("join")]
    return pl.from_arrow(shuffle.gather(paths, part, rows)) if paths else None  # type: ignore[return-value]


def scatter_history(job: Job, work: Work) -> Work:
    """Sends a part's rows to the buckets of their users: {part, path, rows} to {paths: by history}."""
    rows, schema = shuffle.read(work["path"]), job.schema
    outcomes = joined(job, work["part"], work["rows"])
    paths = {}
    for name, history in schema.histories.items():
        when = [history.when] if history.when else []
        frame = raw.view(schema, rows, outcomes, when, [history.user, history.item])
        time = pl.Series(raw.event_time(schema, rows))
        known = _known(job, name, frame, outcomes, time)
        sent: dict[str, Any] = {
            "user": frame[history.user].cast(pl.String), "item": frame[history.item].cast(pl.String), "time": time,
            "known": known.set(frame[history.item].is_null(), None),
        }  # fmt: skip
        table = pl.DataFrame(sent).with_columns(pl.int_range(pl.len()).alias(shuffle.PLACE)).rechunk().to_arrow()
        paths[name] = send(job, table, "user")
    return {"paths": paths}


def _known(job: Job, name: str, frame: pl.DataFrame, outcomes: pl.DataFrame | None, time: pl.Series) -> pl.Series:
    """When each row became part of its user's history: after it, and after what `when` reads was decided; null: never.

    That an outcome happened is known when it does, all else of it only once its window has closed.
    """
    when = job.schema.histories[name].when
    if when is None:
        return time
    known = time
    for outcome in job.schema.outcomes_of(when):
        assert outcomes is not None
        happened = when.strip() == outcome
        decided = outcomes[f"{outcome}_time"] if happened else time + job.schema.source.outcomes[outcome].window
        known = pl.select(pl.max_horizontal(known, decided)).to_series()
    return known.set(~raw.truth(frame, f"bag.{name}.history.when", when), None)


def gather_history(job: Job, work: Work) -> Work:
    """Earlier items of each row's user in a bucket: {bucket, history} to {history, path}."""
    name = work["history"]
    frame, sizes = _bucket((report["paths"][name] for report in job.found("scatter_history")), work["bucket"])
    user_I = frame["user"].rank("dense").cast(pl.Int64).fill_null(0).to_numpy()  # 0: nobody, who has no history
    event_E = np.flatnonzero(frame["known"].is_not_null().to_numpy() & (user_I > 0))
    time_I = frame["time"].fill_null(np.iinfo(np.int64).min).to_numpy()
    known_E = frame["known"].gather(event_E).to_numpy()
    offsets, event_V = recent(user_I, time_I, user_I[event_E], known_E, job.schema.bag[name].max_length)
    items = frame["item"].gather(event_E[event_V]).rechunk().to_arrow().cast(pa.large_string())
    lists = pl.Series(name, pa.LargeListArray.from_arrays(pa.array(offsets), items))
    return {"history": name, "path": _reply(job, frame.select(shuffle.PLACE).with_columns(lists), sizes)}


def histories(job: Job, part: int, rows: int) -> dict[str, pa.Array]:
    """The lists of each history for a part."""
    found = {}
    for name in job.schema.histories:
        paths = [report["path"] for report in job.found("gather_history") if report["history"] == name]
        found[name] = shuffle.gather(paths, part, rows)[name].combine_chunks()
    return found
