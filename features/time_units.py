"""How a column of times may be written: a unit of whole numbers since 1970, a plain order, or a strptime format."""

import re
from datetime import datetime, timezone

import polars as pl

from features.printable import has_controls

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 to 9999
INDEX = "index"  # numbers that only order the rows, in seconds of no calendar
DEFAULT = "s"
MAX_FORMAT = 100  # characters
_PROBES = (datetime(2026, 11, 7, 22, 5, 3, tzinfo=timezone.utc), datetime(1999, 1, 31, tzinfo=timezone.utc))


def as_utc(seconds: float) -> str:
    """A time since 1970 in ISO 8601, in UTC; one beyond the years that dates have as its seconds."""
    if not FIRST_SECOND <= seconds <= LAST_SECOND:
        return f"{int(seconds)} s"
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def is_format(unit: str) -> bool:
    """Whether a unit of `source.times` is a strptime format."""
    return "%" in unit


def check_unit(unit: str) -> str:
    """The unit. Raises ValueError for one that is neither a unit nor a format with year, month and day."""
    if unit in PER_SECOND or unit == INDEX:
        return unit
    if not is_format(unit):
        raise ValueError(
            f"{unit!r} is no unit of time: use {', '.join(PER_SECOND)} since 1970, index for a plain order, or a strptime "
            "format such as %d/%m/%Y %H:%M"
        )
    if len(unit) > MAX_FORMAT or has_controls(unit):
        raise ValueError(f"a strptime format has at most {MAX_FORMAT} characters, and no control characters")
    if "%Z" in unit:
        raise ValueError(f"{unit!r}: names of time zones are not read: use %z for offsets, or source.timezone")
    if not _reads_days(unit):
        raise ValueError(
            f"{unit!r} is no strptime format of a moment: it needs year, month and day, such as %d/%m/%Y %H:%M "
            "(polars lists the directives)"
        )
    return unit


def with_minutes(unit: str) -> tuple[str, str]:
    """A strptime format with minutes, which polars needs where there are hours, and what a text of `unit` then lacks."""
    hours, minutes = (re.search(rf"(?<!%)(?:%%)*%-?[{of}]", unit) for of in ("HIkl", "McrRTX"))
    return (unit + "%M", "00") if hours and not minutes else (unit, "")


def _reads_days(unit: str) -> bool:
    """Whether texts that are written by a format are read by it as moments of the same day."""
    probes = pl.Series(_PROBES)
    try:
        whole, rest = with_minutes(unit)
        found = (probes.dt.strftime(unit) + rest).str.to_datetime(whole, strict=False, time_unit="us")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return False
    return found.dt.date().to_list() == [probe.date() for probe in _PROBES]
