"""Numbers as a page prints them: four significant digits, thousands separators, a real minus sign, ends as fine as errors."""

import math
from typing import NamedTuple

from pipeline.evaluation.report.content import Estimate

NOTHING = "–"
DIGITS = 4  # significant ones of a figure
OF_ERROR = 2  # significant ones of half an interval
FINEST = 9  # decimals at most
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


class Shown(NamedTuple):
    """An estimate as text: its value, and its interval in brackets or a dash."""

    value: str
    interval: str

    def __str__(self) -> str:
        return self.value if self.interval == NOTHING else f"{self.value} {self.interval}"


def significant(value: float | None, digits: int = DIGITS) -> str:
    """A number of so many significant digits."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if -5 < (power := _power(value, digits)) < 9:
        return _minus(f"{value:,.{max(0, digits - 1 - power)}f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return _minus(f"{mantissa}e{int(exponent)}")


def figure(found: Estimate) -> Shown:
    """A figure of four significant digits: more where its interval is narrower, fewer where they would be noise."""
    if found.value is None or found.low is None or found.high is None:
        return Shown(significant(found.value), NOTHING)
    of_value = DIGITS - 1 - _power(found.value, DIGITS) if found.value else 0
    of_error = _of_error(found)
    return _aligned(found, max(of_error, min(of_value, of_error + 1)), "")


def difference(found: Estimate, unit: str = "") -> Shown:
    """A difference with its sign, as fine as its interval, or of three significant digits; unit: "%" for a share."""
    scaled = Estimate(*(None if x is None else 100 * x for x in found)) if unit == "%" else found
    if scaled.value is None or scaled.low is None or scaled.high is None:
        text = significant(scaled.value, 3)
        return Shown(f"{'+' if (scaled.value or 0) > 0 else ''}{text}{unit if text != NOTHING else ''}", NOTHING)
    return _aligned(scaled, _of_error(scaled), "+", unit)


def _aligned(found: Estimate, decimals: int, sign: str, unit: str = "") -> Shown:
    decimals = min(max(decimals, 0), FINEST)
    value, low, high = (_fixed(x, decimals, sign) + unit for x in found if x is not None)
    return Shown(value, f"[{low}, {high}]")


def _fixed(value: float, decimals: int, sign: str) -> str:
    """So many decimals; what rounds to 0 has no sign."""
    zero = f"{0:.{decimals}f}"
    text = f"{value:{sign},.{decimals}f}"
    return zero if text.lstrip("+-") == zero else _minus(text)


def _of_error(found: Estimate) -> int:
    half = ((found.high or 0.0) - (found.low or 0.0)) / 2
    return OF_ERROR - 1 - _power(half, OF_ERROR) if half > 0 else DIGITS


def _power(value: float, digits: int) -> int:
    """The power of ten of a number's first digit, once it is rounded to so many digits."""
    return int(f"{value:.{digits - 1}e}".split("e")[1])


def count(value: float | None) -> str:
    """A number of things."""
    return NOTHING if value is None else f"{value:,.0f}"


def compact(value: float) -> str:
    """A number on an axis: 450k, 1.2M."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return _minus(f"{value / size:.3g}{unit}")
    return _minus(f"{value:.3g}").replace("e−0", "e−")


def percent(share: float | None, digits: int = 3) -> str:
    """A share of so many significant digits in percent."""
    return NOTHING if share is None or not math.isfinite(share) else f"{significant(100 * share, digits)}%"


def _minus(text: str) -> str:
    return text.replace("-", "−")
