"""Days whose files are absent, by the dates in file names, and the impressions whose outcomes these leave undecided.

An outcome may be in an absent file. So an impression at time t is undecided where its window [t, t + window] touches an
absent day [midnight, next midnight) in the time zone of the outcome's stream. Days after the stream's last file are the
ordinary end of a log (see schedule.complete_until), but for those before `as_of`, by which they are declared complete.

An outcome without a window may happen at any time: a day that is absent before the stream's last file leaves all impressions
up to its end undecided, and days after the last file those from their beginning on.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from fnmatch import fnmatchcase
from zoneinfo import ZoneInfo

import numpy as np

from features.schema.schema import Schema
from features.source import Outcome
from pipeline.ingest.files import RawFile
from pipeline.ingest.state import IMPRESSIONS, AbsentDays

# Shapes: B rows.

SECOND = timedelta(seconds=1)
EVER = 1 << 62  # seconds, beyond any time of an event
LAST_DAY = date.max.toordinal() - 1  # whose next midnight can be computed
ISO_DATE = re.compile(r"(?=(\d{4}-\d{2}-\d{2}))")

Range = tuple[int, int]


def absent_days(schema: Schema, streams: Mapping[str, Sequence[RawFile]], as_of: datetime | None) -> AbsentDays:
    """The absent days of a log that is read whole; of one that is read by day, those of its outcomes' windows.

    Args:
        streams: the files of each stream; with `date` those that may hold a day and its outcomes.
        as_of: until when outcomes are declared complete.
    """
    impressions = days_of(streams[IMPRESSIONS], schema.source.files)
    days = {IMPRESSIONS: _gaps(impressions, min(impressions), max(impressions)) if impressions else []}
    undecided, ends = {}, {}
    for name, outcome in schema.source.outcomes.items():
        if not (present := days_of(streams[name], outcome.files)):
            continue
        zone, last = schema.source.format_of(name).zone, max(present)
        needed = max(impressions) + days_after(outcome) if impressions else last
        if outcome.window and as_of is None:
            needed = min(needed, last)
        elif outcome.window and as_of is not None:
            needed = min(needed, (as_of.astimezone(zone) - SECOND).toordinal())
        named = max(needed, *impressions) if impressions else needed
        days[name] = _gaps(present, min(impressions or present), min(named, LAST_DAY))
        ends[name] = midnight(min(last, LAST_DAY) + 1, zone)
        if outcome.open_window != "keep":
            undecided[name] = _merged(_times(gap, last, outcome, zone) for gap in days[name])
    return AbsentDays(
        {stream: [_shown(gap) for gap in gaps] for stream, gaps in days.items() if gaps},
        {name: ranges for name, ranges in undecided.items() if ranges},
        ends,
    )


def days_of(files: Iterable[RawFile], pattern: str) -> set[int]:
    """The days in the names of files, as ordinals; empty where the pattern has no {date}."""
    return {day.toordinal() for file in files if (day := day_of(file.path, pattern))}


def day_of(path: str, pattern: str) -> date | None:
    """The day that stands in place of {date} in the path of a file that was found by `pattern`; None for another word there.

    Folders are matched one by one from the file upwards, so a date in the path of the input folder is none of the file's.
    """
    if "{date}" not in pattern:
        return None
    folders = path.split("/")
    wanted = [part for part in pattern.split("/") if part not in ("", ".")]
    for text in dict.fromkeys(text for folder in reversed(folders) for text in ISO_DATE.findall(folder)):
        if _ends_with(folders, [part.replace("{date}", text) for part in wanted]):
            try:
                return date.fromisoformat(text)
            except ValueError:  # 2026-02-30
                continue
    return None


def _ends_with(folders: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the last of some names are as wanted, where ** stands for any number of them.

    What stands between two ** is looked for once, as near to the end as it can be: so its time grows with the product of
    both lengths, whatever the pattern is.
    """
    at, place = len(folders), len(wanted)  # what is before them is still to be matched
    retry: tuple[int, int] | None = None  # where the ** that was met last goes on with one more name
    while place:
        if wanted[place - 1] == "**":
            place -= 1
            retry = at - 1, place
        elif at and fnmatchcase(folders[at - 1], wanted[place - 1]):
            at, place = at - 1, place - 1
        elif retry and retry[0] >= 0:
            at, place = retry
            retry = at - 1, place
        else:
            return False
    return True


def days_after(outcome: Outcome) -> int:
    """Days after an impression's on which an outcome may happen within its window; 0 without one."""
    return 1 + (int(outcome.window or 0) - 1) // 86_400


def midnight(day: int, zone: ZoneInfo) -> int:
    """Seconds since 1970 at which a day, given as an ordinal, begins."""
    return int(datetime.combine(date.fromordinal(day), time(), zone).timestamp())


def is_undecided(time_B: np.ndarray, ranges: Sequence[Range]) -> np.ndarray:
    """Whether times lie in one of the ranges [start, stop), which are disjoint and in order; shape (B,)."""
    return np.searchsorted(np.array(ranges, np.int64).ravel(), time_B, side="right") % 2 == 1


def _times(gap: Range, last: int, outcome: Outcome, zone: ZoneInfo) -> Range:
    """The times of impressions that absent days leave undecided."""
    start, stop = midnight(gap[0], zone), midnight(gap[1] + 1, zone)
    if outcome.window:
        return start - outcome.window, stop
    return (-EVER, stop) if gap[0] < last else (start, EVER)


def _gaps(present: set[int], first: int, last: int) -> list[Range]:
    """The runs of days from `first` to `last` that are not there."""
    gaps, expected = [], first
    for day in [*sorted(day for day in present if first <= day <= last), last + 1]:
        if day > expected:
            gaps.append((expected, day - 1))
        expected = day + 1
    return gaps


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges that overlap or touch as one."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _shown(gap: Range) -> str:
    first, last = (date.fromordinal(day).isoformat() for day in gap)
    return first if first == last else f"{first}..{last}"
