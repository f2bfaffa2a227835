"""Times of a block of rows: texts, numbers and timestamps as whole seconds since 1970 UTC, and which are implausible."""

import polars as pl
import pyarrow as pa

from features.kinds.values import hexadecimal
from features.source import Format
from features.time_units import DEFAULT, FIRST_SECOND, INDEX, LAST_SECOND, PER_SECOND, is_format, with_minutes

EARLIEST, LATEST = 631_152_000, 4_102_444_800  # 1 January of 1990 and of 2100, seconds since 1970
FARTHEST = 2**62  # of a plain order: a window is added to it without an overflow
FIRST_HOUR, LAST_HOUR = 1_990_010_100, 2_100_123_123  # as YYYYMMDDhh; as seconds, of 2033 to 2036
MOST_EAST, MOST_WEST = 14 * 60, -12 * 60  # minutes, the offsets that clocks on earth show
IMPLAUSIBLE = "is not between 1990 and 2100"  # of the reason, by which dead letters are found again
OWN_UNIT = {b"unit": b"of the file"}  # metadata of a column of seconds that the file has as timestamps
_ISO = r"^(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(?:[.,]\d+)?)?\s*(Z|z|UTC|[+-]\d\d(?::?\d\d)?)?$"
_DECIMAL = r"^([+-]?\d+)\.(\d*)$"
_EXPONENT = r"^([+-]?\d+(?:\.\d*)?[eE][+-]?\d+)$"
# What numbers beyond the years 1990 to 2100 may be instead, each with the smallest and the largest one.
_LIKELY: list[tuple[str, str, int, int]] = [
    ("milliseconds", "ms", EARLIEST * 10**3, LATEST * 10**3),
    ("microseconds", "us", EARLIEST * 10**6, LATEST * 10**6),
    ("nanoseconds", "ns", EARLIEST * 10**9, LATEST * 10**9),
    ("seconds", "s", EARLIEST, LATEST),
    ("YYYYMMDD", '"%Y%m%d"', 19_900_101, 21_001_231),
    ("YYYYMMDDhhmm", '"%Y%m%d%H%M"', 199_001_010_000, 210_012_312_359),
    ("YYYYMMDDhhmmss", '"%Y%m%d%H%M%S"', 19_900_101_000_000, 21_001_231_235_959),
]


def has_own_unit(field: pa.Field) -> bool:
    """Whether a column of typed rows was one of timestamps, so that no unit of the schema changes it."""
    return OWN_UNIT.items() <= (field.metadata or {}).items()


def seconds(name: str, values: pl.Series | pa.Array, form: Format) -> tuple[pl.Series, pl.Series]:
    """A column of times as whole seconds since 1970 UTC, rounded down, and which of its values are not valid.

    Args:
        name: of the column; `form.times` has its unit or strptime format.
        values: cleaned texts, int64, or timestamps in seconds; of the last the unit is known.
        form: how the file is written; times that name no zone are in its own. An hour that the clock shows twice is the
            first of the two, one that it skips is no time.
    Returns: int64 of shape (B,), null where there is none; bool of shape (B,).
    """
    unit = form.unit_of(name)
    if isinstance(values, pa.Array) and pa.types.is_timestamp(values.type):
        return _of_timestamps(values, form)
    series = pl.Series(values)
    if series.dtype in (pl.String, pl.Null):
        texts = series.cast(pl.String).str.strip_chars(" \t")
        found = _formatted(texts, unit, form) if is_format(unit) else _of_texts(texts, unit, form)
    elif is_format(unit):
        found = _formatted(series.cast(pl.String), unit, form)
    else:
        found = _whole(series.cast(pl.Int64), unit)
    return found, found.is_null() & series.is_not_null()


def _of_timestamps(values: pa.Array, form: Format) -> tuple[pl.Series, pl.Series]:
    """As `seconds`, of timestamps in seconds; those beyond the years 1 to 9999 that name no zone are no times."""
    ticks = pl.Series(values.cast(pa.int64()))
    if values.type.tz is not None:
        return ticks, pl.Series([False]).new_from_index(0, len(ticks))
    known = ticks.set(~ticks.is_between(FIRST_SECOND, LAST_SECOND), None)
    found = _absolute((known * 1000).cast(pl.Datetime("ms")), form)
    return found, found.is_null() & ticks.is_not_null()


def _whole(ticks: pl.Series, unit: str) -> pl.Series:
    """Whole numbers of a unit as seconds, rounded down."""
    size = PER_SECOND.get(unit, 1)
    return ticks if size == 1 else ticks // size


def _absolute(naive: pl.Series, form: Format) -> pl.Series:
    """Timestamps as seconds since 1970 UTC; those without a zone are in the format's, and null where it skips them."""
    if naive.dtype.time_zone is None:  # type: ignore[attr-defined]
        naive = naive.dt.replace_time_zone(form.timezone, ambiguous="earliest", non_existent="null")
    return naive.dt.epoch("s")


def _formatted(texts: pl.Series, unit: str, form: Format) -> pl.Series:
    """Texts of one strptime format as seconds; null where a text is of another form."""
    unit, rest = with_minutes(unit)
    return _absolute((texts + rest).str.to_datetime(unit, strict=False, time_unit="us"), form)


def _of_texts(texts: pl.Series, unit: str, form: Format) -> pl.Series:
    """Numbers of a unit, or dates and times of ISO 8601, as seconds; null where a text is neither."""
    found = _whole(texts.cast(pl.Int64, strict=False), unit)
    if (left := found.is_null() & texts.is_not_null()).any():
        found = found.scatter(left.arg_true(), iso_8601(texts.filter(left), form))
    if (left := found.is_null() & texts.is_not_null()).any():
        rest = texts.filter(left)
        number = hexadecimal(rest).zip_with(rest.str.contains("^0[xX]"), _decimal(rest))
        found = found.scatter(left.arg_true(), _whole(number, unit))
    return found


def _decimal(texts: pl.Series) -> pl.Series:
    """Numbers with a point or an exponent as int64, rounded down: a column of whole numbers of which one is missing is
    written so by pandas. Null for other texts, and for what int64 does not hold.
    """
    part = texts.str.extract_groups(_DECIMAL).struct
    whole, fraction = part.field("1").cast(pl.Int64, strict=False), part.field("2").str.contains("[1-9]")
    below = texts.str.starts_with("-") & fraction.fill_null(False)
    number = texts.str.extract(_EXPONENT, 1).cast(pl.Float64, strict=False).floor()
    exponent = number.set(~(number.abs() < 2.0**63).fill_null(False), None).cast(pl.Int64)
    return (whole - below.cast(pl.Int64)).zip_with(whole.is_not_null(), exponent)


def iso_8601(texts: pl.Series, form: Format) -> pl.Series:
    """ISO 8601 dates and times as whole seconds since 1970 UTC; null where a text is no time.

    A text without an offset is in the format's time zone. Offsets are those of clocks on earth, -12:00 to +14:00.
    """
    part = texts.str.extract_groups(_ISO).struct
    clock = part.field("2").fill_null("00:00") + part.field("3").fill_null(":00")
    naive = (part.field("1") + " " + clock).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
    offset = part.field("4").str.replace_all(":", "", literal=True)
    signed = offset.str.extract(r"^([+-])", 1).replace_strict({"+": 1, "-": -1}, default=0, return_dtype=pl.Int64)
    hours = offset.str.slice(1, 2).cast(pl.Int64, strict=False).fill_null(0)
    minutes = offset.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0)
    east = signed * (hours * 60 + minutes)
    real = (minutes < 60) & east.is_between(MOST_WEST, MOST_EAST)
    absolute = (naive.dt.epoch("s") - east * 60).set(~real, None)
    return _absolute(naive, form).zip_with(offset.is_null(), absolute)


def implausible(values: pl.Series, unit: str = DEFAULT) -> pl.Series | None:
    """Which seconds since 1970 are no times of a log, that is beyond 1990 and 2100; None where none is.

    Of a plain order (`index`) those beyond FARTHEST. Seconds of 2033 to 2036 that all read as YYYYMMDDhh are none either.
    """
    first, last = (-FARTHEST, FARTHEST) if unit == INDEX else (EARLIEST, LATEST)
    lowest, highest = values.min(), values.max()
    if lowest is None or (lowest >= first and highest <= last):  # type: ignore[operator]
        hours = unit == DEFAULT and lowest is not None and lowest >= FIRST_HOUR and highest <= LAST_HOUR  # type: ignore[operator]
        return values.is_not_null() if hours and _are_hours(values) else None
    return ~values.is_between(first, last).fill_null(True)


def _are_hours(values: pl.Series) -> bool:
    """Whether all numbers read as YYYYMMDDhh; of seconds since 1970 one in a hundred does by chance."""
    month, day, hour = values // 10**4 % 100, values // 100 % 100, values % 100
    return bool((month.is_between(1, 12) & day.is_between(1, 31) & (hour < 24)).all())


def plausible(values: pl.Series, unit: str = DEFAULT) -> pl.Series:
    """The times, null where they are implausible."""
    wrong = implausible(values, unit)
    return values if wrong is None else values.set(wrong, None)


def implausible_reason(
    name: str, values: pl.Series, unit: str, key: str, derived: bool = False, own_unit: bool = False
) -> pl.Series:
    """Why times are refused that `implausible` found, with the likely unit, and where to set it.

    Args:
        name: of their column.
        values: seconds since 1970.
        unit: as which they were read.
        key: where the schema has the units, such as source.times.
        derived: whether an expression makes them.
        own_unit: whether they are timestamps of a file, see `has_own_unit`.
    """
    if unit == INDEX:
        return pl.select(pl.format("{}: {} is not between -2^62 and 2^62", pl.lit(name), values)).to_series()
    if unit == DEFAULT and not own_unit and not derived and EARLIEST <= values.min() <= values.max() <= LATEST:  # type: ignore[operator]
        calendar = (
            f'reads as YYYYMMDDhh, and in seconds since 1970 as one of 2033 to 2036: set {key}: {{{name}: "%Y%m%d%H"}}'
        )
        return pl.select(pl.format("{}: {} {}", pl.lit(name), values, pl.lit(calendar))).to_series()
    what = pl.format(f"{{}}: {{}} {IMPLAUSIBLE} in seconds since 1970", pl.lit(name), values)
    likely = pl.lit(f": where it is a plain order, set {key}: {{{name}: {INDEX}}}")
    if own_unit:
        wrong = pl.lit(": its timestamps have a unit of their own, the wrong one: write the column again, or")
        return pl.select(pl.concat_str(what, wrong, likely.str.strip_prefix(":"))).to_series()
    raw = values.cast(pl.Float64) * PER_SECOND.get(unit, 1)
    for words, other, first, last in reversed(_LIKELY):
        if other != unit:
            cure = f"make it seconds in source.derived.{name}" if derived else f"set {key}: {{{name}: {other}}}"
            hint = pl.lit(f": {words}? {cure}")
            likely = pl.when(pl.lit(raw).is_between(first, last)).then(hint).otherwise(likely)
    return pl.select(pl.concat_str(what, likely)).to_series()
