"""Whether outcomes found their impressions, and these their rows in side tables: else all labels and columns are empty."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.join.outcomes import EXAMPLES
from features.join.side_tables import KEY, VALID_FROM
from features.kinds.canonical import as_ids
from features.parse import raw
from features.printable import printable
from features.time_units import as_utc
from pipeline.ingest import shuffle
from pipeline.ingest.messages import JoinReport, JoinSide, LookUpReport, ReadReport
from pipeline.ingest.state import IMPRESSIONS, Job

ENOUGH = 1000  # rows of either side, from which on a part of a log in which nothing is joined is no chance
SHOWN = 40  # characters of a key
ADVICE = {
    "unmatched": "Keys are compared as text: fix key, or derive one that both sides have",
    "late": "Fix the column time, its unit or time zone, or the window",
    "early": "Fix the column time, its unit or time zone",
}  # by the most frequent reason


def check_joined(job: Job, min_joined: float, whole_log: bool, max_bad_fraction: float) -> None:
    """Raises UserError where a smaller share than `min_joined` of an outcome's rows, duplicates apart, was joined, or none.

    Where the log is a part of a longer one, as a day is, most outcomes may belong to impressions of other parts: there only
    a stream of ENOUGH rows of which none was joined to ENOUGH impressions stops the job.

    Args:
        max_bad_fraction: streams with more bad rows are left to the check of these, which names the first.
    """
    reports = job.found(JoinReport)
    impressions = _merged(report.impressions for report in reports)
    if not impressions.rows or _is_bad(job, IMPRESSIONS, max_bad_fraction) or not min_joined:
        return
    for name in job.schema.source.outcomes:
        statuses = sum((Counter(report.join_statuses[name]) for report in reports), Counter[str]())
        joined, rows = statuses["joined"], statuses.total() - statuses["duplicate"]
        bad = _bad_rows(job, name)
        few = joined < min_joined * rows or (rows + bad and not joined)
        if not whole_log:
            few = not joined and min(rows + bad, impressions.rows) >= ENOUGH
        if few and not rows and not _is_bad(job, name, max_bad_fraction):
            raise UserError(
                f"source.outcomes.{name}: all of its {bad:,} rows are bad, so no impression has one. Fix what makes them bad, "
                "or set a lower max_bad_fraction, which names the first; if the log is right, set min_joined=0."
            )
        if few and not _is_bad(job, name, max_bad_fraction):
            outcomes = _merged(report.outcomes[name] for report in reports)
            raise UserError(_message(name, statuses, rows, impressions, outcomes, min_joined))


def check_looked_up(job: Job, min_joined: float, whole_log: bool, max_bad_fraction: float) -> None:
    """Raises UserError where no impression has a row in a side table; of a part of a log only with ENOUGH impressions.

    Args:
        max_bad_fraction: see `check_joined`.
    """
    if not min_joined or _is_bad(job, IMPRESSIONS, max_bad_fraction):
        return
    for name in job.schema.source.tables:
        reports = [report for report in job.found(LookUpReport) if report.table == name]
        statuses = sum((Counter(report.statuses) for report in reports), Counter[str]())
        without = statuses["unmatched"] + statuses["early"]
        if statuses["matched"] or without < (1 if whole_log else ENOUGH) or _is_bad(job, name, max_bad_fraction):
            continue
        if statuses["early"] <= statuses["unmatched"]:
            raise UserError(_without_row(job, name, without))
        if times := [
            time for part in job.typed() for time in _span(raw.event_time(job.schema, shuffle.read(part.path)))
        ]:  # else all rows are bad ones
            raise UserError(_too_late(job, name, without, times))


def _without_row(job: Job, name: str, impressions: int) -> str:
    """The line for a side table that has none of the impressions' keys."""
    table, rows = job.schema.source.tables[name], shuffle.read(next(part.path for part in job.typed() if part.rows))
    wanted = as_ids(raw.column(job.schema, rows, table.foreign_key), f"source.tables.{name}.by").dictionary.to_pylist()
    ours, theirs = (JoinSide(rows=0, keys=keys[:EXAMPLES]) for keys in (wanted, _table_keys(job, name)))
    return (
        f"source.tables.{name}: none of {impressions:,} impressions has a row in it. Impressions have in "
        f"{table.foreign_key} keys such as {_shown(ours)}; the table has in {table.key} {_shown(theirs)}. Keys are compared as "
        "text: fix key or by; if the log is right, set min_joined=0."
    )


def _too_late(job: Job, name: str, impressions: int, times: list[int]) -> str:
    """The line for a side table whose versions, or snapshots, all begin after the impressions, of which `times` are."""
    table, source = job.schema.source.tables[name], job.schema.source
    began = job.snapshots.get(name) or [
        time
        for path in job.table_rows(name)
        for bucket in range(1 if name in job.broadcast else job.buckets)
        for time in _span(shuffle.read(path, bucket)[VALID_FROM])
    ]
    what = table.valid_from or "{date} of files"
    cure = (
        f"the column {table.valid_from} or its unit in {source.format_key(name)}.times"
        if table.valid_from
        else "the days in its files' names, or add earlier files"
    )
    return (
        f"source.tables.{name}: none of {impressions:,} impressions has a version that had begun. {what} runs from "
        f"{as_utc(min(began))} to {as_utc(max(began))}, impressions from {as_utc(min(times))} to {as_utc(max(times))}: fix "
        f"{cure}; if the log is right, set min_joined=0."
    )


def _span(times: pa.Array) -> list[int]:
    """The first and the last of some times; none of none."""
    return [time for time in pc.min_max(times).as_py().values() if time is not None]


def _table_keys(job: Job, name: str) -> list[str]:
    """Some keys of a side table."""
    for path in job.table_rows(name):
        for bucket in range(1 if name in job.broadcast else job.buckets):
            if keys := shuffle.read(path, bucket)[KEY].unique().to_pylist():
                return keys
    return []


def _is_bad(job: Job, stream: str, max_bad_fraction: float) -> bool:
    """Whether a stream has more bad rows than allowed, each counted for the lines that it takes."""
    reads = [report for report in job.found(ReadReport) if report.stream == stream]
    swallowed = sum(report.swallowed for report in reads)
    bad = swallowed + _bad_rows(job, stream)
    return bad > max_bad_fraction * (swallowed + sum(report.read for report in reads))


def _bad_rows(job: Job, stream: str) -> int:
    """The dead letters of a stream."""
    reads = [report for report in job.found(ReadReport) if report.stream == stream]
    return sum(sum(report.dead_letters.reasons.values()) for report in reads)


def _merged(sides: Iterable[JoinSide]) -> JoinSide:
    """A side of the join over all buckets."""
    found = list(sides)
    times = [time for side in found for time in (side.first, side.last) if time is not None]
    return JoinSide(
        rows=sum(side.rows for side in found),
        keys=[key for side in found for key in side.keys][:EXAMPLES],
        first=min(times, default=None),
        last=max(times, default=None),
    )


def _message(
    name: str, statuses: Counter[str], rows: int, impressions: JoinSide, outcomes: JoinSide, min_joined: float
) -> str:
    """The line that says what the two sides look like."""
    reasons = sorted(ADVICE, key=lambda reason: -statuses[reason])
    counts = ", ".join(f"{statuses[reason]:,} {reason}" for reason in reasons if statuses[reason])
    return (
        f"source.outcomes.{name}: {statuses['joined']:,} of {rows:,} rows belong to an impression ({counts}). Impressions "
        f"have keys such as {_shown(impressions)}; rows of {name} without an impression have keys such as {_shown(outcomes)}. "
        f"{ADVICE[reasons[0]]}; if the log is right, set min_joined below {min_joined:g} (0: no check)."
    )


def _shown(side: JoinSide) -> str:
    """Keys and times of a side, in a line of limited length."""
    keys = [f"'{printable(key if len(key) <= SHOWN else key[: SHOWN - 1] + '…')}'" for key in side.keys]
    times = (
        "" if side.first is None or side.last is None else f", and times {as_utc(side.first)} to {as_utc(side.last)}"
    )
    return f"{', '.join(keys) or 'none'}{times}"
