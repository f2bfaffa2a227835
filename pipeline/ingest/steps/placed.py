"""Rows of outcomes and side tables that have a place: a key and, where their stream has times, a plausible one."""

from datetime import date

import polars as pl
import pyarrow as pa

from features.kinds import times
from features.parse import raw
from features.parse.raw import LINE, ROW
from features.time_units import INDEX
from pipeline.ingest.absent_days import midnight
from pipeline.ingest.state import Job

# Shapes: B rows.

IN_1971 = 31_536_000  # seconds since 1970


def placed(job: Job, stream: str, rows: pa.Table, key: str, time: str | None) -> tuple[pa.Table, pl.DataFrame]:
    """Typed rows without those that lack their key or time, or whose time is implausible, and these as dead letters."""
    reasons = _reasons(job, stream, rows, key, time)
    if not (lost := reasons.is_not_null()).any():
        return rows, raw.dead_letters()
    gone = rows.filter(lost.to_arrow())
    cells = raw.as_json(gone.drop_columns([LINE, ROW]))
    return rows.filter((~lost).to_arrow()), raw.dead_letters(gone[LINE].to_numpy(), reasons.filter(lost), cells)


def _reasons(job: Job, stream: str, rows: pa.Table, key: str, time: str | None) -> pl.Series:
    """Why rows have no place, null for those that have one; shape (B,)."""
    reason = pl.Series([None], dtype=pl.String).new_from_index(0, rows.num_rows)
    for column, text in ((key, "missing key"), (time, "missing time")):
        if column and (missing := pl.Series(rows[column]).is_null()).any():
            reason = reason.zip_with(~missing | reason.is_not_null(), pl.Series([f"{column}: {text}"]))
    if not time:
        return reason
    time_B, unit = pl.Series(rows[time]), job.schema.source.format_of(stream).unit_of(time)
    wrong = times.implausible(time_B, unit)
    if wrong is not None and stream in job.schema.source.tables and unit != INDEX:
        wrong &= ~_is_old(job, stream, time_B)
    if wrong is not None and wrong.any():
        units = f"{job.schema.source.format_key(stream)}.times"
        own_unit = times.has_own_unit(rows.schema.field(time))
        why = times.implausible_reason(time, time_B, unit, units, own_unit=own_unit)
        reason = reason.zip_with(~wrong | reason.is_not_null(), why)
    return reason


def _is_old(job: Job, table: str, time_B: pl.Series) -> pl.Series:
    """Which versions of a side table began before 1990, as they may: 1970-01-01 or 1900-01-01 often means always.

    Not within 1970: days, hours and minutes since 1970, and YYYYMMDD, lie there where they are read as seconds.
    """
    always = max(0, midnight(date(1970, 1, 1).toordinal(), job.schema.source.format_of(table).zone))
    return ((time_B <= always) | time_B.is_between(IN_1971, times.EARLIEST)).fill_null(False)
