"""Steps `scatter_history` and `gather_history`: earlier items of each row's user, a bucket of users at a time."""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.join.history import recent
from features.parse import compute, raw
from pipeline.ingest import shuffle
from pipeline.ingest.absent_days import is_undecided
from pipeline.ingest.messages import GatherHistoryReport, GatherHistoryWork, PartWork, ScatterHistoryReport
from pipeline.ingest.state import Job
from pipeline.ingest.steps.join import joined, scatter


def scatter_history(job: Job, work: PartWork) -> ScatterHistoryReport:
    """Scatters users, items and times of a part to the buckets of their users."""
    rows, schema = shuffle.read(work.part.path), job.schema
    outcomes = joined(job, work.index, work.part.rows)
    paths = {}
    for name, history in schema.histories.items():
        when = [history.when] if history.when else []
        frame = raw.view(schema, rows, outcomes, when, [history.user, history.item])
        time = pl.Series(raw.event_time(schema, rows))
        known = _known(job, name, frame, outcomes, time)
        columns: dict[str, Any] = {
            "user": frame[history.user].cast(pl.String), "item": frame[history.item].cast(pl.String), "time": time,
            "known": known.set(frame[history.item].is_null(), None),
        }  # fmt: skip
        table = pl.DataFrame(columns).with_columns(pl.int_range(pl.len()).alias(shuffle.POSITION)).rechunk().to_arrow()
        paths[name] = scatter(job, table, "user")
    return ScatterHistoryReport(paths)


def _known(job: Job, name: str, frame: pl.DataFrame, outcomes: pl.DataFrame | None, time: pl.Series) -> pl.Series:
    """When each row became part of its user's history: after it, and after what `when` reads was decided; null: never.

    That an outcome happened is known when it does, all else of it only once its window has closed, and never where it may be
    in a file that is absent.
    """
    when = job.schema.histories[name].when
    if when is None:
        return time
    known, counts = time, compute.truth(frame, f"bag.{name}.history.when", when)
    for outcome in job.schema.outcomes_of(when):
        assert outcomes is not None
        happened = when.strip() == outcome
        decided = outcomes[f"{outcome}_time"] if happened else time + job.schema.source.outcomes[outcome].window
        known = pl.select(pl.max_horizontal(known, decided)).to_series()
        if not happened and outcome in job.absent.undecided:
            counts &= ~pl.Series(is_undecided(time.fill_null(0).to_numpy(), job.absent.undecided[outcome]))
    return known.set(~counts, None)


def gather_history(job: Job, work: GatherHistoryWork) -> GatherHistoryReport:
    """Makes the lists of a bucket: for each row the earlier items of its user."""
    name = work.history
    frame, sizes = shuffle.read_bucket([report.paths[name] for report in job.found(ScatterHistoryReport)], work.bucket)
    user_I = frame["user"].rank("dense").cast(pl.Int64).fill_null(0).to_numpy()  # 0: no user, so no history
    event_E = np.flatnonzero(frame["known"].is_not_null().to_numpy() & (user_I > 0))
    time_I = frame["time"].fill_null(np.iinfo(np.int64).min).to_numpy()
    known_E = frame["known"].gather(event_E).to_numpy()
    offsets, event_V = recent(user_I, time_I, user_I[event_E], known_E, job.schema.bag[name].max_length)
    items = frame["item"].gather(event_E[event_V]).rechunk().to_arrow().cast(pa.large_string())
    lists = pl.Series(name, pa.LargeListArray.from_arrays(pa.array(offsets), items))
    columns = frame.select(shuffle.POSITION).with_columns(lists)
    return GatherHistoryReport(name, shuffle.write_batches(job.temporary_path("gathered"), columns, sizes))


def histories(job: Job, part: int, rows: int) -> dict[str, pa.Array]:
    """The lists of each history for a part."""
    found = {}
    for name in job.schema.histories:
        paths = [report.path for report in job.found(GatherHistoryReport) if report.history == name]
        found[name] = shuffle.gather(paths, part, rows)[name].combine_chunks()
    return found
