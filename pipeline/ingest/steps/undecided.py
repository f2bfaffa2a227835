"""Impressions whose outcomes are not decided: a window was still open when the log ended, or a day's files are absent."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from features.parse import raw
from pipeline.ingest.absent_days import day_of, is_undecided, midnight
from pipeline.ingest.messages import ReadReport
from pipeline.ingest.state import Job

WINDOW_OPEN, FILES_ABSENT = "window still open", "files of a day absent"
NO_TIME = -(1 << 63)  # of rows without a time, which become dead letters


@dataclass(frozen=True)
class Undecided:
    """B impressions of a part.

    Attributes:
        open_windows: per outcome [B] whether its window was still open when its stream ended.
        absent: per outcome [B] whether it may be in a file that is absent.
    """

    open_windows: dict[str, np.ndarray]
    absent: dict[str, np.ndarray]

    @property
    def either(self) -> dict[str, np.ndarray]:
        """Per outcome [B]."""
        found = dict(self.open_windows)
        for name, absent_B in self.absent.items():
            found[name] = found[name] | absent_B if name in found else absent_B
        return found

    @property
    def causes(self) -> dict[str, dict[str, int]]:
        """Rows by outcome and cause; those of both causes count as open windows."""
        found: dict[str, dict[str, int]] = {}
        for name, either_B in self.either.items():
            open_ = int(self.open_windows[name].sum()) if name in self.open_windows else 0
            causes = {WINDOW_OPEN: open_, FILES_ABSENT: int(either_B.sum()) - open_}
            found[name] = {cause: rows for cause, rows in causes.items() if rows}
        return {name: causes for name, causes in found.items() if causes}


def undecided(job: Job, unit: int, rows: pa.Table, as_of: Mapping[str, int]) -> Undecided:
    """What is undecided of typed impressions.

    Args:
        unit: number of theirs.
        as_of: seconds since 1970 until when each outcome with a window is complete.
    """
    if not as_of and not job.absent.undecided:
        return Undecided({}, {})
    time_B = _time_or_day(job, unit, rows)
    windows = {n: time_B > until - int(job.schema.source.outcomes[n].window or 0) for n, until in as_of.items()}
    return Undecided(windows, {n: is_undecided(time_B, ranges) for n, ranges in job.absent.undecided.items()})


def _time_or_day(job: Job, unit: int, rows: pa.Table) -> np.ndarray:
    """Event times; in a schema without, the beginning of the day in the name of their file, 0 where it has none."""
    if job.schema.event_time:
        return pl.Series(raw.event_time(job.schema, rows)).fill_null(NO_TIME).to_numpy()
    day = day_of(job.found(ReadReport)[unit].file, job.schema.source.files)
    return np.full(rows.num_rows, midnight(day.toordinal(), job.schema.source.zone) if day else 0)
