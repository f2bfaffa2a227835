"""Step `label`: typed rows and what was joined to them to features, labels and split, which are counted."""

import pickle
from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa

from features.fit.statistics import Statistics
from features.parse import raw
from features.parse.raw import SPLIT
from features.schema.schema import SPLITS, Split
from pipeline.ingest import shuffle
from pipeline.ingest.absent_days import day_of, is_undecided, midnight
from pipeline.ingest.messages import LabelledPart, LabelReport, LabelWork, ReadReport
from pipeline.ingest.state import Job
from pipeline.ingest.steps.dead_letters import spill
from pipeline.ingest.steps.history import histories
from pipeline.ingest.steps.join import joined

WINDOW_OPEN, FILES_ABSENT = "window still open", "files of a day absent"
NO_TIME = -(1 << 63)  # of rows without a time, which become dead letters
RANKS = 65  # of a part's rows in time, whose event times it reports


def label(job: Job, work: LabelWork) -> LabelReport:
    """Labels a typed part."""
    part, rows = work.part, shuffle.read(work.part.path)
    outcomes = joined(job, work.index, part.rows)
    lists = histories(job, work.index, part.rows)
    labelled, dead_letters = label_rows(job, part.unit, part.row_id, rows, outcomes, lists, work.as_of)
    return LabelReport(labelled, spill(job, [dead_letters]))


def label_rows(
    job: Job,
    unit: int,
    row_id: int,
    rows: pa.Table,
    outcomes: pl.DataFrame | None = None,
    lists: dict[str, pa.Array] | None = None,
    as_of: Mapping[str, int] | None = None,
) -> tuple[LabelledPart, pl.DataFrame]:
    """Labels typed rows, writes and counts them; returns the part and its dead letters.

    Args:
        unit, row_id: see TypedPart.
        outcomes: columns that outcomes add.
        lists: of histories.
        as_of: see LabelWork.
    """
    windows, absent = _undecided(job, unit, rows, as_of or {})
    parsed = raw.parse(job.schema, rows, row_id, outcomes, windows, lists, absent)
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
        undecided=_causes(windows, absent),
    )
    return part, parsed.bad


def _undecided(
    job: Job, unit: int, rows: pa.Table, as_of: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per outcome [B] whether its window was still open, and whether it may lie in the files of an absent day."""
    if not as_of and not job.absent.undecided:
        return {}, {}
    time_B = _time_or_day(job, unit, rows)
    windows = {n: time_B > until - int(job.schema.source.outcomes[n].window or 0) for n, until in as_of.items()}
    return windows, {name: is_undecided(time_B, ranges) for name, ranges in job.absent.undecided.items()}


def _time_or_day(job: Job, unit: int, rows: pa.Table) -> np.ndarray:
    """Event times; in a schema without, the beginning of the day in the name of their file, 0 where it has none."""
    if job.schema.event_time:
        return pl.Series(raw.event_time(job.schema, rows)).fill_null(NO_TIME).to_numpy()
    day = day_of(job.found(ReadReport)[unit].file, job.schema.source.files)
    return np.full(rows.num_rows, midnight(day.toordinal(), job.schema.source.zone) if day else 0)


def _causes(windows: dict[str, np.ndarray], absent: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Rows that are undecided by outcome and cause; those of both causes count as open windows."""
    found: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys([*windows, *absent]):
        none_B = np.zeros(1, bool)
        open_B = windows.get(name, none_B)
        causes = {WINDOW_OPEN: open_B, FILES_ABSENT: absent.get(name, none_B) & ~open_B}
        found[name] = {cause: int(rows_B.sum()) for cause, rows_B in causes.items() if rows_B.any()}
    return {name: causes for name, causes in found.items() if causes}


def _times(rows: pa.Table, split_B: np.ndarray) -> dict[Split, list[int]]:
    """Event times of each split at evenly spaced ranks, from which the bounds of shards are made."""
    time_B = rows["event_time"].to_numpy()
    found = {name: np.sort(time_B[split_B == code]) for code, name in enumerate(SPLITS)}
    return {name: t[np.linspace(0, len(t) - 1, RANKS).astype(np.int64)].tolist() for name, t in found.items() if len(t)}
