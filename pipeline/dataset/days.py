"""Datasets of single days, read as one: which days there are, and how their row ids stay apart."""

import logging
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from features.errors import UserError
from features.regular_files import refuse_link
from pipeline.dataset.listing import each_of
from pipeline.overrides import setting
from pipeline.storage.store_path import on_store

DAY_STRIDE = 1 << 56  # between the row ids of days: room for 65,536 files, each of which has 1 << 40
MAX_DAYS = (1 << 63) // DAY_STRIDE

logger = logging.getLogger(__name__)


def written_out(day: Any) -> str:
    """How a day that was given in another form is written; of what is none, how any day is."""
    digits = re.fullmatch(r"(\d{4})\D?(\d\d)\D?(\d\d)", str(day))
    found = "-".join(digits.groups()) if digits else ""
    return found if day_of(found) else "2026-11-07"


def _joined(value: Any) -> Any:
    """A list of days and ranges as one text, so that a run's config.yaml has a text whichever way they were given.

    Raises:
        ValueError: a number, as 20261107 is.
    """
    if isinstance(value, int | float):
        raise ValueError(f"{value} is no date as YYYY-MM-DD: write {written_out(value)}")
    return ",".join(map(str, value)) if isinstance(value, list) and value else value


# Days of a dataset of days: FIRST..LAST, a day, or several of these in ascending order, as a list or separated by commas.
Days = Annotated[str | None, BeforeValidator(_joined)]
# What a day without a dataset means: one line that stops the job, or that it is left out.
MissingDays = Literal["refuse", "skip"]


def days_in(folder: Path) -> list[date]:
    """The days whose datasets lie in a folder, in order."""
    if on_store(folder):
        named = _days_named(folder)
        there = each_of(folder, lambda path: (path / "manifest.json").is_file(), named)
        return sorted(
            day for path, is_there in zip(named, there, strict=True) if is_there and (day := day_of(path.name))
        )
    return sorted(day for file in folder.glob("*/manifest.json") if (day := day_of(file.parent.name)))


def _days_named(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if day_of(path.name)]
    except FileNotFoundError:
        return []


def day_ranges(folder: Path) -> list[str]:
    """The days whose datasets lie in a folder, in order, as the ranges FIRST..LAST that `open_dataset` takes."""
    return ranges_of(days_in(folder))


def ranges_of(days: Iterable[date]) -> list[str]:
    """Days in ascending order as ranges FIRST..LAST without holes; a single day as itself."""
    ranges: list[list[date]] = []
    for day in days:
        if ranges and day == ranges[-1][1] + timedelta(days=1):
            ranges[-1][1] = day
        else:
            ranges.append([day, day])
    return [f"{first}" if first == last else f"{first}..{last}" for first, last in ranges]


def folder_of_day(folder: Path, day: str) -> Path:
    """Where a day's dataset lies. Raises UserError where that is a link: the datasets of days lie in their folder."""
    return refuse_link(folder / day)


def day_of(name: str) -> date | None:
    """The day that a folder is named by, None where it is another word."""
    try:
        day = date.fromisoformat(name)
    except ValueError:
        return None
    return day if day.isoformat() == name else None


def chosen_days(folder: Path, days: str, missing_days: MissingDays) -> list[str]:
    """The days that are read, in order.

    Args:
        folder: of the datasets of days.
        days: see Days.
        missing_days: whether those without a dataset are left out, which is logged.
    Raises:
        UserError: `days` are no days or do not ascend; one has no dataset, or, left out, none of them has one.
    """
    wanted = parse_days(days)
    there = {*days_in(folder)}
    found = [day for day in wanted if day in there]
    missing = [day for day in wanted if day not in there]
    if not found:
        raise UserError(f"days={days}: {folder} has no dataset of these days. {_available(folder)}")
    if missing and missing_days == "refuse":
        first = missing[0]
        raise UserError(
            f"days={days}: no dataset of {_listed(missing)} in {folder}. Run jobs.preprocess with "
            f"{shlex.quote(setting('out', folder))} date={first} first, or set {days_setting(found)} or missing_days=skip."
        )
    if missing:
        logger.warning("days=%s: without %s, of which %s has no dataset", days, _listed(missing), folder)
    return [day.isoformat() for day in found]


def days_setting(days: Sequence[date]) -> str:
    """The setting that names these days, as a shell takes it: days=FIRST..LAST, or a quoted list of several ranges."""
    ranges = ranges_of(days)
    return f"days={ranges[0]}" if len(ranges) == 1 else f'"days=[{",".join(ranges)}]"'


def parse_days(days: str) -> list[date]:
    """The days that a text names. Raises UserError where it names none, or they do not ascend."""
    found: list[date] = []
    for part in days.split(","):
        first, separator, last = part.strip().partition("..")
        try:
            start, stop = date.fromisoformat(first), date.fromisoformat(last if separator else first)
        except ValueError as error:
            raise UserError(
                f"days={days}: {error}. Write 2026-11-01..2026-11-21, one day, or a list of both: "
                '"days=[2026-11-01..2026-11-05,2026-11-07]".'
            ) from None
        if stop < start:
            raise UserError(f"days={days}: the last day is before the first")
        if found and start <= found[-1]:
            raise UserError(f"days={days}: {start} does not follow {found[-1]}. Name the days in order, each once.")
        found += [start + timedelta(days=number) for number in range((stop - start).days + 1)]
    return found


def _available(folder: Path) -> str:
    ranges = day_ranges(folder)
    return f"It has those of {', '.join(ranges)}." if ranges else "Run jobs.preprocess with date= first."


def _listed(days: Sequence[date], most: int = 5) -> str:
    """Days in words, the first few of many."""
    ranges = ranges_of(days)
    return ", ".join(ranges[:most]) + (f" and {len(ranges) - most} more" if len(ranges) > most else "")
