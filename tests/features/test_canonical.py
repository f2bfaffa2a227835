"""The canonical text of ids, against Python's int, Decimal, datetime and re."""

import math
import re
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.kinds.canonical import as_ids, as_text, canonical

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
HOLDS = {
    **{name: (np.iinfo(name).min, np.iinfo(name).max) for name in INTEGERS},
    "float16": (-(2**11), 2**11),
    "float32": (-(2**24), 2**24),
    "float64": (-(2**53), 2**53),
    "decimal32": (-(10**7) + 1, 10**7 - 1),
    "decimal": (-(10**36) + 1, 10**36 - 1),
    "wide decimal": (-(10**70) + 1, 10**70 - 1),
    "decimal of thousands": (-(10**9), 10**9),
    "text": (-(10**80), 10**80),
    "text with decimals": (-(10**80), 10**80),
}


def held(number: int, kind: str) -> pa.Array | None:
    """A whole number as a value of a physical type; None where the type does not hold it."""
    low, high = HOLDS[kind]
    if not low <= number <= high or (kind == "decimal of thousands" and number % 1000):
        return None
    if kind.startswith("text"):
        return pa.array([f"{number}.00" if "decimals" in kind else str(number)])
    if kind.startswith("float"):
        return pa.array(np.array([number], kind))
    types = {
        "decimal32": pa.decimal32(9, 2), "decimal": pa.decimal128(38, 2), "wide decimal": pa.decimal256(76, 5),
        "decimal of thousands": pa.decimal128(20, -3),
    }  # fmt: skip
    return pa.array([Decimal(number)], types[kind]) if kind in types else pa.array([number], getattr(pa, kind)())


NUMBERS = st.integers(-300, 300) | st.integers(-(2**53), 2**53) | st.integers(-(10**72), 10**72)


@settings(max_examples=examples(150), deadline=None)
@given(NUMBERS | NUMBERS.map(lambda n: n * 1000), st.booleans())
def test_a_whole_number_is_its_digits_in_every_type_that_holds_it(number: int, coded: bool) -> None:
    for kind in HOLDS:
        array = held(number, kind)
        if array is None:
            continue
        array = pa.concat_arrays([array, pa.nulls(1, array.type)])
        assert canonical(array, "here").to_pylist() == [str(number), None], kind
        array = array.dictionary_encode() if coded and kind not in ("float16", "decimal32") else array
        assert as_ids(array, "here").to_pylist() == [str(number), None], kind


def test_zero_has_no_sign_and_nan_is_missing() -> None:
    for kind in (np.float16, np.float32, np.float64):
        assert canonical(pa.array(np.array([-0.0, 0.0, math.nan], kind)), "here").to_pylist() == ["0", "0", None]
    texts = pa.array(["-0", "-0.0", "-0.000", "0.0", "0", "-00.0", "nan"])
    assert canonical(texts, "here").to_pylist() == ["0", "0", "0", "0", "0", "-00", "nan"]


def plain_text(text: str) -> str:
    """A text as an id, by the words of the rule."""
    if re.fullmatch(r"-?[0-9]+(\.0+)?", text):
        whole = text.partition(".")[0]
        return text if "." not in text and text != "-0" else "0" if whole == "-0" else whole
    return text


NAMES = [
    "007",
    "007.0",
    "1e5",
    "1.0e5",
    "1.50",
    "1.",
    ".0",
    "a.0",
    "1.0.0",
    "1,0",
    "+1.0",
    "--1.0",
    "1.0\n",
    " 1.0",
    "٣.0",
    "10.01",
]


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(st.none() | st.text("-01.e", max_size=6) | st.sampled_from(NAMES) | st.text(max_size=4), max_size=10))
def test_text_is_a_name_unless_it_is_a_plain_number_whose_decimals_are_zeros(texts: list[str | None]) -> None:
    expected = [None if text is None else plain_text(text) for text in texts]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        assert canonical(pa.array(texts, kind), "here").to_pylist() == expected
    assert as_ids(pl.Series(texts, dtype=pl.String), "here").to_pylist() == expected
    again = canonical(pa.array(expected, pa.string()), "here").to_pylist()
    assert again == [None if text is None else plain_text(text) for text in expected]


def plain_moment(moment: datetime) -> str:
    """ISO 8601 by Python, with the rules about zeros and days."""
    text = moment.isoformat()
    day, _, clock = text.partition("T")
    clock, zone = clock.removesuffix("+00:00"), "Z" if moment.tzinfo else ""
    clock = clock.rstrip("0").removesuffix(".") if "." in clock else clock
    return day if clock == "00:00:00" and not zone else f"{day}T{clock}{zone}"


MOMENTS = st.datetimes(datetime(1700, 1, 1), datetime(2250, 1, 1))
UNITS = {"s": 10**6, "ms": 10**3, "us": 1, "ns": 1}  # microseconds of a tick


@settings(max_examples=examples(100), deadline=None)
@given(
    MOMENTS, st.sampled_from([1, 1000, 10**6, 10**6, 86_400 * 10**6]), st.sampled_from([None, "UTC", "Asia/Kolkata"])
)
def test_a_moment_is_one_text_in_every_unit_that_holds_it_and_zones_are_utc(
    moment: datetime, grid: int, zone: str | None
) -> None:
    since = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1) // grid * grid
    moment = datetime(1970, 1, 1, tzinfo=timezone.utc if zone else None) + timedelta(microseconds=since)
    for unit, step in UNITS.items():
        if since % step == 0:
            ticks = since // step * (1000 if unit == "ns" else 1)
            assert canonical(pa.array([ticks, None], pa.timestamp(unit, zone)), "here").to_pylist() == [
                plain_moment(moment),
                None,
            ]
    if not zone and grid == 86_400 * 10**6:
        days = since // grid
        assert canonical(pa.array([days], pa.date32()), "here").to_pylist() == [moment.date().isoformat()]
        assert canonical(pa.array([days * 86_400_000], pa.date64()), "here").to_pylist() == [plain_moment(moment)]


def test_nanoseconds_times_of_day_and_truth_values_have_one_text() -> None:
    assert canonical(pa.array([1, 10**9 + 120], pa.timestamp("ns")), "here").to_pylist() == [
        "1970-01-01T00:00:00.000000001", "1970-01-01T00:00:01.00000012",
    ]  # fmt: skip
    for unit, kind in ((10**3, pa.time32("ms")), (10**6, pa.time64("us")), (10**9, pa.time64("ns"))):
        assert canonical(pa.array([0, unit + unit // 2], kind), "here").to_pylist() == ["00:00:00", "00:00:01.5"]
    assert canonical(pa.array([True, False, None]), "here").to_pylist() == ["true", "false", None]
    assert canonical(pa.array([b"a", None]), "here").to_pylist() == ["a", None]
    assert canonical(pa.nulls(2), "here").to_pylist() == [None, None]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_bytes_that_a_file_calls_text_are_none(kind: pa.DataType) -> None:
    bytes_ = pa.array([b"a", b"\xff"], pa.binary() if kind == pa.string() else pa.large_binary())
    with pytest.raises(pa.ArrowInvalid):
        as_text(bytes_.view(kind))


HOW = (
    "Make it whole or text in source.derived: CAST(... AS BIGINT) of a column of type float, or CAST(... AS VARCHAR); of "
    "outcomes and side tables in their files."
)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (pa.array([2.0, None, 1.5]), "here holds 1.5, which is no id. Make it whole or text in source.derived: CAST("),
        (pa.array([0.5], pa.float32()), "here holds 0.5, which is no id"),
        (pa.array([math.inf]), "here holds inf, which is no id"),
        (pa.array([Decimal("1.50")]), "here holds 1.50, which is no id"),
        (pa.array([2.5]), f"here holds 2.5, which is no id. {HOW}"),
        (pa.array([2.0**53 + 2]), "here holds 9007199254740994.0, of which a float has lost the last digits."),
        (pa.array([2.0**24 + 2], pa.float32()), "here holds 16777218.0, of which a float has lost the last digits"),
        (pa.array([1e300]), "here holds 1e+300, of which a float has lost the last digits"),
        (pa.array([2**62], pa.timestamp("s")), "here holds a time beyond the years 1 to 9999"),
        (pa.array([2**31 - 1], pa.date32()), "here holds a time beyond the years 1 to 9999"),
    ],
)  # fmt: skip
def test_fractions_and_what_a_float_does_not_hold_exactly_are_no_ids(values: pa.Array, says: str) -> None:
    for make in (canonical, as_ids):
        with pytest.raises(UserError) as caught:
            make(values, "here")
        assert str(caught.value).startswith(says)
        assert "\n" not in str(caught.value)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.none() | st.floats(allow_nan=False) | NUMBERS.map(float), max_size=8))
@example([2.0**63, -(2.0**63)])
def test_the_text_of_any_float_reads_as_the_same_number(numbers: list[float | None]) -> None:
    texts = as_text(pa.array(numbers, pa.float64())).to_pylist()
    assert [None if text is None else float(text) for text in texts] == numbers
    for text, number in zip(texts, numbers, strict=True):
        if number is not None and abs(number) < 2**63 and number == int(number):
            assert text == str(int(number))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([3, None, -3, 3]), ["3", None, "-3", "3"]),
        (pl.Series([3.0, None]), ["3", None]),
        (pl.Series([True, None, False]), ["true", None, "false"]),
        (pl.Series(["ä", None, "", "ä"]), ["ä", None, "", "ä"]),
        (pl.Series([None, None]), [None, None]),
        (pl.Series([], dtype=pl.Int64), []),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([1, None, 1]), ["1", None, "1"]),
    ],
)
def test_any_column_can_be_ids(values: Any, expected: list[str | None]) -> None:
    found = as_ids(values, "here")
    assert pa.types.is_dictionary(found.type)
    assert found.to_pylist() == expected
