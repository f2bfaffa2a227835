"""Times of texts, numbers and timestamps, against datetime and zoneinfo."""

import math
from datetime import datetime, timedelta, timezone
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

import polars as pl
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.kinds.times import iso_8601, seconds
from features.source import Format

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# Half an hour, no daylight saving, daylight saving by half an hour and on the southern half, a day that was left out.
ZONES = [
    "UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "America/Sao_Paulo",
    "Pacific/Apia", "Africa/Casablanca", "Asia/Tokyo",
]  # fmt: skip
MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(2037, 12, 31))


def since_1970(moment: datetime) -> int:
    """Whole seconds since 1970, rounded down."""
    return math.floor((moment - EPOCH) / timedelta(seconds=1))


def plain_local(naive: datetime, zone: str) -> int | None:
    """The first moment at which the clocks of a zone show this; None where they never do."""
    moment = naive.replace(tzinfo=ZoneInfo(zone), fold=0).astimezone(timezone.utc)
    shown = moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    return since_1970(moment) if shown == naive else None


format_of = cache(lambda zone: Format(timezone=zone))


def read(texts: list[str], zone: str = "UTC") -> list[int | None]:
    return iso_8601(pl.Series(texts, dtype=pl.String), format_of(zone)).to_list()


def one(text: str, zone: str = "UTC") -> int | None:
    return read([text], zone)[0]


CLOCKS = st.sampled_from(["T%H:%M", " %H:%M", "T%H:%M:%S", " %H:%M:%S", " %H:%M:%S.%f", "T%H:%M:%S,%f"])


@st.composite
def written(draw: st.DrawFn) -> tuple[datetime, str]:
    """A moment without a zone, and how it may be written."""
    moment, clock = draw(MOMENTS), draw(CLOCKS)
    moment = moment if "%f" in clock else moment.replace(microsecond=0)
    moment = moment if "%S" in clock else moment.replace(second=0)
    return moment, moment.strftime("%Y-%m-%d" + clock)


@st.composite
def offsets(draw: st.DrawFn) -> tuple[timezone, str]:
    """An offset, and how it may be written."""
    minutes = draw(st.just(0) | st.sampled_from([60, -60, 120, 840, -720]) | st.integers(-12 * 60, 14 * 60))
    hour, minute = divmod(abs(minutes), 60)
    ways = [f"{hour:02}:{minute:02}", f"{hour:02}{minute:02}"] + [f"{hour:02}"] * (minute == 0)
    ways = [sign + way for way in ways for sign in ("+" * (minutes >= 0), "-" * (minutes <= 0)) if sign]
    ways += ["Z", "z", "UTC"] * (minutes == 0)
    return timezone(timedelta(minutes=minutes)), draw(st.sampled_from(["", " "])) + draw(st.sampled_from(ways))


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.tuples(written(), offsets()), max_size=20), st.sampled_from(ZONES))
def test_a_time_with_an_offset_is_that_moment_whatever_the_format_says(cells, zone):
    texts = [text + offset for (_, text), (_, offset) in cells]
    assert read(texts, zone) == [since_1970(moment.replace(tzinfo=offset)) for (moment, _), (offset, _) in cells]


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(written(), max_size=20), st.sampled_from(ZONES))
def test_a_time_without_an_offset_is_what_the_clocks_of_the_formats_zone_showed(cells, zone):
    expected = [plain_local(moment.replace(microsecond=0), zone) for moment, _ in cells]
    assert read([text for _, text in cells], zone) == expected


def changes_of(zone: str) -> list[datetime]:
    """What the clocks of a zone showed, days apart, before and after they were set, between 2000 and 2030."""
    days = [datetime(2000, 1, 1, tzinfo=timezone.utc) + timedelta(days=day) for day in range(30 * 365)]
    shift = [day.astimezone(ZoneInfo(zone)).utcoffset() for day in days]
    return [days[i].replace(tzinfo=None) for i in range(len(days) - 1) if shift[i] != shift[i + 1]]


@pytest.mark.parametrize("zone", [zone for zone in ZONES if zone not in ("UTC", "Asia/Kolkata", "Asia/Tokyo")])
def test_around_changes_of_the_clocks_the_hour_shown_twice_is_the_first_and_the_one_left_out_no_time(zone):
    half_hours = [timedelta(minutes=30 * number) for number in range(-30, 100)]
    shown = [day + half_hour for day in changes_of(zone)[:12] for half_hour in half_hours]
    expected = [plain_local(naive, zone) for naive in shown]
    assert read([naive.isoformat(" ") for naive in shown], zone) == expected
    assert None in expected


def test_the_hours_of_a_change_in_berlin():
    assert one("2026-03-29 01:59:59", "Europe/Berlin") == since_1970(
        datetime(2026, 3, 29, 0, 59, 59, tzinfo=timezone.utc)
    )
    assert one("2026-03-29 02:30", "Europe/Berlin") is None
    assert one("2026-03-29 03:00", "Europe/Berlin") == since_1970(datetime(2026, 3, 29, 1, tzinfo=timezone.utc))
    assert one("2026-10-25 02:30", "Europe/Berlin") == since_1970(datetime(2026, 10, 25, 0, 30, tzinfo=timezone.utc))
    assert one("2026-10-25 02:30+01:00", "Europe/Berlin") == since_1970(
        datetime(2026, 10, 25, 1, 30, tzinfo=timezone.utc)
    )


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(MOMENTS, max_size=20), st.sampled_from(ZONES))
def test_a_date_without_a_clock_is_its_midnight(moments, zone):
    midnights = [datetime(moment.year, moment.month, moment.day) for moment in moments]
    texts = [moment.strftime("%Y-%m-%d") for moment in moments]
    assert read(texts, zone) == [plain_local(midnight, zone) for midnight in midnights]
    assert read([text + "Z" for text in texts], zone) == [since_1970(m.replace(tzinfo=timezone.utc)) for m in midnights]


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(st.datetimes(datetime(1901, 1, 1), datetime(1969, 12, 31)), max_size=20))
def test_before_1970_fractions_are_rounded_down_too(moments):
    texts = [moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for moment in moments]
    assert read(texts) == [since_1970(moment.replace(tzinfo=timezone.utc)) for moment in moments]


@pytest.mark.parametrize(
    "text",
    [
        "", "noon", "2026", "2026-1-2", "2026-13-01", "2026-02-30", "26-01-02", "2026-01-02 24:00", "2026-01-02 12",
        "2026-01-02 12:60", "2026-01-02 12:00:61", "2026-01-02T", "2026-01-02 12:00:00.", "2026-01-02 12:00 +1",
        "2026-01-02 12:00 CET", "2026-01-02 12:00 PM", "x2026-01-02", "2026-01-02x", "2026/01/02", "01.02.2026",
        "2026-01-02 12:00:00 +02:00 ", "+2026-01-02",
        "2026-01-02 12:00+99:99", "2026-01-02 12:00+24:00", "2026-01-02 12:00+14:60", "2026-01-02 12:00+1401",
        "2026-01-02 12:00-12:01", "2026-01-02 12:00-13", "2026-01-02 12:00+00:60",
    ],
)  # fmt: skip
def test_what_is_no_date_or_time_is_none(text):
    assert one(text) is None


def test_every_zone_that_a_schema_may_name_is_one_that_times_can_be_read_in():
    named = pl.Series([datetime(2026, 1, 2)])
    for name in available_timezones():
        try:
            named.dt.replace_time_zone(name)
        except pl.exceptions.PolarsError:
            with pytest.raises(ValueError, match="is no time zone"):
                Format(timezone=name)


# Units and formats


def test_times_may_be_seconds_since_1970_or_written_out_in_one_column():
    texts = ["1767312000", "2026-01-02", "-1", None, " 2026-01-02T00:00:00+01:00 ", "soon", "1e3", "1.5"]
    values, wrong = seconds("at", pl.Series(texts), Format())
    assert values.to_list() == [1767312000, 1767312000, -1, None, 1767308400, None, 1000, 1]
    assert wrong.to_list() == [False, False, False, False, False, True, False, False]
