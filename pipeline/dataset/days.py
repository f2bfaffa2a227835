"""Datasets of single days, read as one: which days there are, and how their row ids stay apart."""

from datetime import date, timedelta
from pathlib import Path

from features.errors import UserError
from features.regular_files import refuse_link

DAY_STRIDE = 1 << 56  # between the row ids of days: room for 65,536 files, each of which has 1 << 40
MAX_DAYS = (1 << 63) // DAY_STRIDE


def day_ranges(folder: Path) -> list[str]:
    """The days whose datasets lie in a folder, in order, as the ranges FIRST..LAST that `open_dataset` takes."""
    days = sorted(day for file in folder.glob("*/manifest.json") if (day := _day(file.parent.name)))
    ranges: list[list[date]] = []
    for day in days:
        if ranges and day == ranges[-1][1] + timedelta(days=1):
            ranges[-1][1] = day
        else:
            ranges.append([day, day])
    return [_span(first.isoformat(), last.isoformat()) for first, last in ranges]


def folder_of_day(folder: Path, day: str) -> Path:
    """Where a day's dataset lies. Raises UserError where that is a link: the datasets of days lie in their folder."""
    return refuse_link(folder / day)


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}..{last}"


def _day(name: str) -> date | None:
    """The day that a folder is named by, None where it is another word."""
    try:
        day = date.fromisoformat(name)
    except ValueError:
        return None
    return day if day.isoformat() == name else None


def _dates(days: str) -> list[str]:
    first, _, last = days.partition("..")
    try:
        start, stop = date.fromisoformat(first), date.fromisoformat(last or first)
    except ValueError as error:
        raise UserError(f"days={days}: {error}. Write 2026-11-01..2026-11-21, or one day.") from None
    if stop < start:
        raise UserError(f"days={days}: the last day is before the first")
    return [(start + timedelta(days=day)).isoformat() for day in range((stop - start).days + 1)]
