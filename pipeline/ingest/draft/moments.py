"""Times in a column: seconds or parts of them since 1970, ISO 8601, or a format of strptime."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from features.kinds.times import implausible, seconds
from features.source import Format
from features.time_units import DEFAULT

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
WORDS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Day first where both may be: of dates up to the 12th alone the order is ambiguous.
DATES = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y/%m/%d", "%d-%b-%Y", "%d %b %Y", "%b %d %Y")
CLOCKS = (" %H:%M:%S", " %H:%M", "", " %I:%M:%S %p", " %I:%M %p")
FORMATS = (*(date + clock for date in DATES for clock in CLOCKS), "%d/%b/%Y:%H:%M:%S %z")
FORMATS_OF_DIGITS = ("%Y%m%d", "%Y%m%d%H", "%Y%m%d%H%M", "%Y%m%d%H%M%S")
NAME = re.compile(
    r"(^|_)(time|times|timestamp|ts|tstamp|date|datetime|day|dt|at|when|epoch|created|updated|moment|utc|unix)(_|\d*$)"
)
ID = re.compile(r"(^|_)(id|ids|uid|guid|uuid|key)$")


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


def moments_of(texts: pl.Series, name: str) -> Moments | None:
    """The times of a column of text, nulls where missing; None where it does not hold times.

    Args:
        name: of the column, in lower case. A number is a time where it says so, or where the rows are in its order and it
            is not that of an id.
    """
    texts = texts.str.strip_chars()
    known = texts.drop_nulls()
    if known.is_empty():
        return None
    numbers = known.cast(pl.Float64, strict=False)
    if numbers.null_count():
        return _first(texts, [None, *FORMATS])
    if not numbers.is_finite().all():
        return None
    named = NAME.search(name) is not None
    if not named and (ID.search(name) or len(numbers) < 50 or not _ascends(numbers)):
        return None
    return _first(texts, [*UNITS, *FORMATS_OF_DIGITS] if named else list(UNITS))


def _first(texts: pl.Series, units: Sequence[str | None]) -> Moments | None:
    """The first of some units by which all texts are times since 1990 and before 2100, as jobs.preprocess reads them."""
    few = texts.drop_nulls().head(50)
    for unit in units:
        if _seconds(few, unit) is not None and (found := _seconds(texts, unit)) is not None:
            return Moments(unit, found)
    return None


def _seconds(texts: pl.Series, unit: str | None) -> pl.Series | None:
    """Texts as seconds; None where one is no time of that unit."""
    found, wrong = seconds("time", texts, Format(times={"time": unit} if unit else {}))
    return None if wrong.any() or implausible(found, unit or DEFAULT) is not None else found


def _ascends(numbers: pl.Series) -> bool:
    """Whether most rows are in this order, as those of a log are, and are not numbered one by one."""
    steps = np.diff(numbers.to_numpy())
    return float((steps >= 0).mean()) > 0.95 and float((steps == 1).mean()) < 0.9
