"""Times of texts, numbers and timestamps, against datetime and zoneinfo."""

import math
from datetime import datetime, timedelta, timezone
from decimal import ROUND_FLOOR, Decimal, localcontext
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

import polars as pl
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.kinds.times import implausible, implausible_reason, iso_8601, plausible, seconds
from features.schema.schema import Schema
from features.source import Format
from features.time_units import PER_SECOND

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


WHOLE = st.integers(-(2**62), 2**62)
DECIMALS = st.builds(
    lambda whole, fraction: f"{whole}.{fraction}", st.integers(-(10**15), 10**15), st.text("0123456789", max_size=3)
)


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(WHOLE | DECIMALS | st.none(), max_size=20), st.sampled_from([*PER_SECOND, "index"]))
def test_numbers_of_a_unit_are_rounded_down_to_seconds_as_text_and_as_numbers(ticks, unit):
    form, size = Format(times={"at": unit}), PER_SECOND.get(unit, 1)

    def floor(tick):
        return None if tick is None else int((Decimal(tick) / size).to_integral_value(ROUND_FLOOR))

    with localcontext(prec=60):
        expected = [floor(tick) for tick in ticks]
    texts = pl.Series([None if tick is None else str(tick) for tick in ticks], dtype=pl.String)
    values, wrong = seconds("at", texts, form)
    assert values.to_list() == expected
    assert not wrong.any()
    whole = [tick for tick in ticks if not isinstance(tick, str)]
    values, wrong = seconds("at", pa.array(whole, pa.int64()), form)
    assert values.to_list() == [None if tick is None else tick // size for tick in whole]
    assert not wrong.any()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1.7e9", 1_700_000_000), ("1.70000000025e+09", 1_700_000_000), ("-5e-1", -1), ("-0.25", -1), ("-1.0", -1), ("7.", 7),
        ("1e400", None), ("-9.3e18", None), ("inf", None), ("nan", None), ("1.2.3", None), (".", None), ("1e", None),
        ("9223372036854775808", None), ("9223372036854775808e0", None), ("0x65", 101), ("1_000", None), ("1,5", None),
    ],
)  # fmt: skip
def test_floats_that_stand_for_whole_numbers_are_read_and_what_is_no_number_is_not(text, found):
    values, wrong = seconds("at", pl.Series([text]), Format())
    assert (values.to_list(), wrong.to_list()) == ([found], [found is None])


def test_numbers_that_all_read_as_hours_of_a_calendar_are_no_seconds():
    hours = pl.Series([2026110105, None, 2026123123, 1990010100])
    assert implausible(hours).to_list() == [True, None or False, True, True]
    assert implausible_reason("ts", hours, "s", "source.times")[0] == (
        "ts: 2026110105 reads as YYYYMMDDhh, and in seconds since 1970 as one of 2033 to 2036: set source.times: "
        '{ts: "%Y%m%d%H"}'
    )
    for real in (2026110124, 2026110005, 2026130105, 2026113205):  # beside which the others are seconds
        assert implausible(pl.Series([2026110105, real])) is None
    assert implausible(pl.Series([1_800_000_000, 2026110105])) is None
    assert implausible(hours, "index") is None
    values, wrong = seconds("ts", hours, Format(times={"ts": "%Y%m%d%H"}))
    expected = [datetime(2026, 11, 1, 5), None, datetime(2026, 12, 31, 23), datetime(1990, 1, 1)]
    assert values.to_list() == [t and since_1970(t.replace(tzinfo=timezone.utc)) for t in expected]
    assert not wrong.any()


FORMS = [
    "%Y%m%d%H",
    "%d.%m.%Y %Hh",
    "%Y-%m-%d %I%p",
    "%d/%m/%Y %H:%M",
    "%Y%m%d",
    "%Y%m%d%H%M%S",
    "%b %d %Y %I:%M:%S %p",
    "%d.%m.%y %H:%M",
]


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(MOMENTS, max_size=10), st.sampled_from(FORMS), st.sampled_from(ZONES))
def test_texts_of_a_format_are_what_python_reads_on_the_clocks_of_the_zone(moments, form, zone):
    texts = [moment.strftime(form) for moment in moments]
    expected = [plain_local(datetime.strptime(text, form), zone) for text in texts]
    values, wrong = seconds("at", pl.Series(texts, dtype=pl.String), Format(times={"at": form}, timezone=zone))
    assert values.to_list() == expected
    assert wrong.to_list() == [moment is None for moment in expected]


@pytest.mark.parametrize("unit", ["s", "ms", "%d/%m/%Y"])
def test_timestamps_of_a_file_have_a_unit_of_their_own(unit):
    moments = [datetime(2026, 3, 29, 1, 59), datetime(2026, 3, 29, 2, 30), None]  # half past two was left out
    form = Format(times={"at": unit}, timezone="Europe/Berlin")
    values, wrong = seconds("at", pa.array(moments, pa.timestamp("s")), form)
    assert values.to_list() == [plain_local(datetime(2026, 3, 29, 1, 59), "Europe/Berlin"), None, None]
    assert wrong.to_list() == [False, True, False]
    values, _ = seconds("at", pa.array([2**62, -5], pa.timestamp("s", "UTC")), form)
    assert values.to_list() == [2**62, -5]
    values, wrong = seconds("at", pa.array([2**62, -(2**62)], pa.timestamp("s")), form)
    assert values.to_list() == [None, None]
    assert wrong.all()


def test_dates_that_a_file_has_as_numbers_are_read_by_their_format():
    values, _ = seconds("day", pa.array([20261107, None]), Format(times={"day": "%Y%m%d"}))
    assert values.to_list() == [since_1970(datetime(2026, 11, 7, tzinfo=timezone.utc)), None]


@pytest.mark.parametrize(
    "unit",
    ["minutes", "", "S", "%H:%M", "%Y-%m", "%d", "%", "%Y %H", "%d/%m", "%Y-%m-%d %H:%M %Z", "%Q", "%d%m%Y" * 20],
)
def test_what_is_no_unit_or_does_not_tell_the_day_is_refused_when_the_schema_is_read(unit):
    with pytest.raises(ValueError, match=r"times\.at"):
        Format(times={"at": unit})


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "index", *FORMS, "%Y-%m-%dT%H:%M:%S%.f%z", "%s"])
def test_units_and_formats_of_a_moment_are_taken(unit):
    assert Format(times={"at": unit}).unit_of("at") == unit


# Plausible ones

FIRST, LAST = (since_1970(datetime(year, 1, 1, tzinfo=timezone.utc)) for year in (1990, 2100))


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(FIRST - 2, LAST + 2), max_size=10))
def test_times_beyond_1990_and_2100_are_found_and_those_of_a_plain_order_nearly_never(times):
    column = pl.Series(times, dtype=pl.Int64)
    wrong = [time is not None and not FIRST <= time <= LAST for time in times]
    found = implausible(column)
    assert (found.to_list() if found is not None else [False] * len(times)) == wrong
    assert plausible(column).to_list() == [None if bad else time for bad, time in zip(wrong, times, strict=True)]
    far = [time is not None and abs(time) > 2**62 for time in times]
    found = implausible(column, "index")
    assert (found.to_list() if found is not None else [False] * len(times)) == far


@pytest.mark.parametrize(
    ("number", "unit", "likely"),
    [
        (1_700_000_000_000, "s", "milliseconds? set source.times: {at: ms}"),
        (1_700_000_000, "ms", "seconds? set source.times: {at: s}"),
        (1_700_000_000_000_000, "ms", "microseconds? set source.times: {at: us}"),
        (20_261_107, "s", 'YYYYMMDD? set source.times: {at: "%Y%m%d"}'),
        (202_611_071_200, "s", 'YYYYMMDDhhmm? set source.times: {at: "%Y%m%d%H%M"}'),
        (5, "s", "where it is a plain order, set source.times: {at: index}"),
    ],
)
def test_the_reason_names_the_likely_unit(number, unit, likely):
    found, _ = seconds("at", pl.Series([str(number)]), Format(times={"at": unit}))
    assert implausible(found, unit).all()
    assert implausible_reason("{a}", found, unit, "times")[0].startswith(
        f"{{a}}: {found[0]} is not between 1990 and 2100"
    )
    [reason] = implausible_reason("at", found, unit, "source.times")
    assert reason == f"at: {found[0]} is not between 1990 and 2100 in seconds since 1970: {likely}"


# In a schema


def schema(**source):
    outcomes = {"click": {"files": "c", "key": "id", "time": "when", "columns": {"n": "int"}}}
    return Schema.parse(
        {
            "source": {"files": "x", "key": "id", "outcomes": outcomes} | source,
            "dense": {"x": {}}, "tasks": {"t": {"kind": "binary", "label": "click"}}, "event_time": "at",
            "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
        },
        where="mine.yaml",
    )  # fmt: skip


def test_a_unit_makes_a_column_a_time_and_defaults_keep_the_fingerprint():
    assert schema(times={"x": "ms"}).raw_types["x"] == "time"
    assert schema(times={}, optional={}).fingerprint == schema().fingerprint
    assert schema(times={"at": "ms"}).fingerprint != schema().fingerprint


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"times": {"at": "ms"}, "types": {"at": "int"}}, "source: column at is int, and has a unit of time in `times`"),
        ({"times": {"n": "ms"}}, "source.outcomes.click: column n is int, and has a unit of time"),
        ({"times": {"at": "ms"}, "derived": {"at": "y"}}, "source.times.at: it is derived: make it whole seconds"),
        ({"times": {"at": "fortnights"}}, "source.times.at: 'fortnights' is no unit of time: use s, ms, us, ns"),
        ({"optional": {"id": None}}, "source.optional: every row needs column id"),
        ({"optional": {"at": 5}}, "source.optional: every row needs column at"),
        ({"optional": {"when": 5}}, "source.optional: every row needs column when"),
        ({"optional": {"x": "much"}}, "source.optional.x: 'much' is not a number"),
        ({"optional": {"n": 1.5}}, "source.optional.n: 1.5 is not an integer"),
    ],
)  # fmt: skip
def test_units_and_optional_columns_that_contradict_the_schema_are_refused(source, says):
    with pytest.raises(UserError) as caught:
        schema(**source)
    assert says in str(caught.value)
