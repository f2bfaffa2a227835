"""Times in a column: seconds or parts of them since 1970, ISO 8601, or a format of strptime."""

import re
from dataclasses import dataclass

import numpy as np
import polars as pl

from features.kinds.values import times
from features.source import Format

EARLIEST, LATEST = 631_152_000, 4_102_444_800  # 1990 and 2100
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
WORDS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Day first where both may be: of dates up to the 12th alone nothing else can be told.
DATES = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y/%m/%d", "%Y%m%d", "%d-%b-%Y", "%d %b %Y", "%b %d %Y")
CLOCKS = (" %H:%M:%S", " %H:%M", "", " %I:%M:%S %p", " %I:%M %p")
FORMATS = ("%Y%m%d%H%M%S", *(date + clock for date in DATES for clock in CLOCKS), "%d/%b/%Y:%H:%M:%S %z")
NAME = re.compile(
    r"(^|_)(time|times|timestamp|ts|tstamp|date|datetime|day|dt|at|when|epoch|created|updated|moment|utc|unix)(_|\d*$)"
)


@dataclass(frozen=True)
class Moments:
    """The times of a column.

    Attributes:
        unit: s, ms, us or ns since 1970, or a format of strptime; None for ISO 8601.
        seconds: since 1970 UTC, null where the value is missing.
    """

    unit: str | None
    seconds: pl.Series

    @property
    def is_default(self) -> bool:
        """Whether it is read without a word about its unit."""
        return self.unit in (None, "s")

    @property
    def words(self) -> str:
        """The unit, for a comment."""
        if self.unit is None:
            return "dates and times (ISO 8601)"
        return f"{WORDS[self.unit]} since 1970" if self.unit in UNITS else f"times of the form {self.unit}"


ID = re.compile(r"(^|_)(id|ids|uid|guid|uuid|key)$")


def moments_of(texts: pl.Series, name: str) -> Moments | None:
    """The times of a column of text, nulls where missing; None where it does not hold times.

    Args:
        name: of the column, in lower case. A number is a time where it says so, or where the rows are in its order and it
            is not that of an id.
    """
    known = texts.drop_nulls().str.strip_chars()
    if known.is_empty():
        return None
    numbers = known.cast(pl.Int64, strict=False)
    if numbers.null_count() == 0:
        found = _of_numbers(texts, numbers, name)
        return found or (_of_formats(texts, known, ("%Y%m%d%H%M%S", "%Y%m%d")) if NAME.search(name) else None)
    seconds = times(texts.str.strip_chars(), Format())
    if seconds.null_count() == texts.null_count():
        return Moments(None, seconds)
    return _of_formats(texts, known, FORMATS)


def _of_numbers(texts: pl.Series, numbers: pl.Series, name: str) -> Moments | None:
    named, is_id = NAME.search(name) is not None, ID.search(name) is not None
    first, last = numbers.min(), numbers.max()
    for unit, per_second in UNITS.items():
        if EARLIEST * per_second <= first and last < LATEST * per_second:  # type: ignore[operator]
            if is_id or (not named and not (len(numbers) >= 50 and _ascends(numbers))):
                return None
            return Moments(unit, texts.str.strip_chars().cast(pl.Int64, strict=False) // per_second)
    return None


def _ascends(numbers: pl.Series) -> bool:
    """Whether most rows are in this order, as those of a log are, and are not numbered one by one."""
    steps = np.diff(numbers.to_numpy())
    return float((steps >= 0).mean()) > 0.95 and float((steps == 1).mean()) < 0.9


def _of_formats(texts: pl.Series, known: pl.Series, formats: tuple[str, ...]) -> Moments | None:
    """Times in a format of strptime that all texts have."""
    few = known.head(50)
    if not few.str.contains(r"\d").all():
        return None
    for form in formats:
        if not _parsed(few, form).null_count() and not _parsed(known, form).null_count():
            seconds = _parsed(texts.str.strip_chars(), form).dt.epoch("s")
            if seconds.min() >= EARLIEST and seconds.max() < LATEST:  # type: ignore[operator]
                return Moments(form, seconds)
    return None


def _parsed(texts: pl.Series, form: str) -> pl.Series:
    if any(sign in form for sign in ("%H", "%I")):
        return texts.str.to_datetime(form, strict=False, time_unit="us")
    return texts.str.to_date(form, strict=False).cast(pl.Datetime("us"))
