"""Step `label`: typed rows and what was joined to them to features, labels and split, which are counted."""

import pickle
from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.fit.statistics import Statistics
from features.parse import raw
from features.parse.raw import SPLIT
from features.schema.schema import SPLITS, Split
from pipeline.ingest import shuffle
from pipeline.ingest.messages import LabelledPart, LabelReport, PartWork
from pipeline.ingest.state import Job
from pipeline.ingest.steps.dead_letters import spill
from pipeline.ingest.steps.join import joined
from pipeline.ingest.steps.look_up import part_rows
from pipeline.ingest.steps.past import found_past
from pipeline.ingest.steps.undecided import undecided

RANKS = 65  # of a part's rows in time, whose event times it reports


def label(job: Job, work: PartWork) -> LabelReport:
    """Labels a typed part."""
    part, rows = work.part, part_rows(job, work.index, work.part)
    added = joined(job, work.index, part.rows)
    lists, counters = found_past(job, work.index, part.rows)
    if counters is not None:
        added = counters if added is None else added.hstack(counters)
    labelled, dead_letters = label_rows(job, part.unit, part.row_id, rows, added, lists, work.as_of)
    return LabelReport(labelled, spill(job, [dead_letters]))


def label_rows(
    job: Job,
    unit: int,
    row_id: int,
    rows: pa.Table,
    added: pl.DataFrame | None = None,
    lists: dict[str, pa.Array] | None = None,
    as_of: Mapping[str, int] | None = None,
) -> tuple[LabelledPart, pl.DataFrame]:
    """Labels typed rows, writes and counts them; returns the part and its dead letters.

    Args:
        unit, row_id: see TypedPart.
        added: columns that outcomes and counters add.
        lists: of histories.
        as_of: see PartWork.
    """
    open_ = undecided(job, unit, rows, as_of or {})
    parsed = raw.parse(job.schema, rows, row_id, added, open_.open_windows, lists, open_.absent)
    split_B = parsed.rows[SPLIT].to_numpy()
    counted = parsed.rows if job.counts_all else parsed.rows.filter(pa.array(split_B == 0))
    statistics = job.temporary_path("statistics")
    statistics.write_bytes(pickle.dumps(Statistics.of(job.schema, counted)))
    part = LabelledPart(
        unit=unit,
        features=shuffle.write(job.temporary_path("features"), [parsed.rows]),
        rows={name: int((split_B == code).sum()) for code, name in enumerate(SPLITS)},
        left_out=parsed.left_out,
        statistics=str(statistics),
        times=_times(parsed.rows, split_B) if job.order == "time" else {},
        span=list(pc.min_max(parsed.rows["event_time"]).as_py().values()) if parsed.rows.num_rows else [],
        undecided=open_.causes,
    )
    return part, parsed.bad


def _times(rows: pa.Table, split_B: np.ndarray) -> dict[Split, list[int]]:
    """Event times of each split at evenly spaced ranks, from which the bounds of shards are made."""
    time_B = rows["event_time"].to_numpy()
    found = {name: np.sort(time_B[split_B == code]) for code, name in enumerate(SPLITS)}
    return {name: t[np.linspace(0, len(t) - 1, RANKS).astype(np.int64)].tolist() for name, t in found.items() if len(t)}
