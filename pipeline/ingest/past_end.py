"""The state of histories and counters at a job's end, and what it did not see."""

import logging
from collections import Counter
from contextlib import suppress
from datetime import date
from pathlib import Path

from features.errors import UserError
from features.time_units import as_utc
from pipeline.dataset.days import day_of, days_in
from pipeline.dataset.entries import State
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.past_state import stale_days, stale_words
from pipeline.ingest.messages import ReadReport, ScatterPastReport, WriteStateReport
from pipeline.ingest.state import Job

MOST_LATE = 0.5  # share of rows before the horizon of the state that a log goes on from: more were read for it
END_OF_TIME = (1 << 63) - 1
NEAR = 31  # days around a new one that are compared with each other

logger = logging.getLogger(__name__)


def horizon(job: Job) -> int:
    """Seconds since 1970 from which on the rows of a later job are: the end of the job's day, or of its last impression."""
    if job.horizon is not None:
        return job.horizon
    latest = [min(report.latest, END_OF_TIME - 1) + 1 for report in job.found(ReadReport) if report.latest is not None]
    return max([*latest, job.start.state.horizon if job.start else 0], default=0)


def check_overlap(job: Job) -> None:
    """Raises UserError where the log is one that the state it begins from has seen: its rows would count twice."""
    if job.start is None or job.start.is_day_before:
        return
    scattered, rows = job.found(ScatterPastReport), sum(part.rows for part in job.typed())
    late = sum(report.late for report in scattered)
    if late > MOST_LATE * rows:
        earliest = min(report.earliest for report in scattered if report.earliest is not None)
        before = _before(job.start.folder, earliest)
        such = f", such as {before}" if before else ""
        raise UserError(
            f"{late:,} of {rows:,} rows are before {as_utc(job.start.state.horizon)}, where the state of {job.start.folder} "
            f"ends: it has them already. Set state.from to a dataset that ends before {as_utc(earliest)}{such}, or "
            "state.from=empty; with jobs.nightly, date= is the day of the log, and the log has that day alone."
        )


def _before(folder: Path, earliest: int) -> Path | None:
    """The newest day beside `folder` whose state ends before the first row; None where there is none."""
    days = days_in(folder.parent) if day_of(folder.name) else []
    for day in reversed(days):
        state = read_manifest(folder.parent / day.isoformat()).state
        if state and state.horizon <= earliest:
            return folder.parent / day.isoformat()
    return None


def state_of(job: Job, chosen: bool) -> State | None:
    """What the manifest says of the state; None where none is kept.

    Args:
        chosen: whether state.from was given.
    """
    if not job.keeps_state:
        return None
    scattered, start = job.found(ScatterPastReport), job.start
    undecided: Counter[str] = Counter(dict.fromkeys(job.schema.past, 0))
    for report in scattered:
        undecided.update(report.undecided)
    earliest = min((report.earliest for report in scattered if report.earliest is not None), default=None)
    return State(
        horizon=horizon(job),
        began_from=start.origin if start else None,
        chosen=chosen,
        undecided=dict(undecided),
        cut_short=sum(report.late for report in scattered),
        gap=min(max(0, earliest - start.state.horizon), 1 << 50) if start and earliest is not None else 0,
        files=[report.file for report in job.found(WriteStateReport)],
        ahead=sum(report.ahead for report in scattered),
    )


def warn_of_stale_days(folder: Path, day: date) -> None:
    """Logs which days around a new one went on from another past than the day before them now has: this job may be why."""
    with suppress(UserError, OSError):  # another day may be damaged, or replaced meanwhile
        near = [other.isoformat() for other in days_in(folder) if abs((other - day).days) <= NEAR]
        if stale := stale_days(folder, {other: read_manifest(folder / other) for other in near}):
            logger.warning("%s: %s", folder, stale_words(stale))
