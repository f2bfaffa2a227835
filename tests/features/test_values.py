"""Texts to numbers, times and codes, against float, int, datetime and zoneinfo."""

import math
import re

import polars as pl
import pyarrow as pa
import pyarrow.csv as csv
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.kinds.values import as_ids, cleaned, coded, numbers
from features.source import Format

# Numbers

FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]+")
BITS = re.compile(r"0[xX][0-9a-fA-F]{1,16}")  # the 64 bits of a number, the first being its sign
TEXTS = st.one_of(
    st.text("0123456789+-.eExXaF _,", max_size=8),
    st.floats().map(repr),
    st.integers(-(2**65), 2**65).map(str),
    st.integers(-(2**59), 2**65).map(hex),
    st.sampled_from(["inf", "NaN", "Infinity", "1e400", "-1e-400", "True", "٣", "½", "", "nil", "1e3", "0x", "1f"]),
)


def plain_number(text: str, kind: str) -> float | int | None:
    bare = text.strip(" \t")
    if kind == "float":
        value = float(bare) if FLOAT.fullmatch(bare) else math.nan
        return value if math.isfinite(value) else None
    if BITS.fullmatch(bare):
        number = int(bare, 16)
        return number - 2**64 if number >= 2**63 else number
    number = int(bare) if INTEGER.fullmatch(bare) else 2**63
    return number if -(2**63) <= number < 2**63 else None


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(TEXTS | st.none() | TEXTS.map(lambda t: f" {t}\t"), max_size=20))
def test_numbers_are_those_that_python_reads_and_others_are_told_apart_from_missing_ones(texts):
    for kind in ("float", "int"):
        expected = [None if t is None else plain_number(t, kind) for t in texts]
        values, wrong = numbers(pl.Series(texts, dtype=pl.String), kind)
        assert values.dtype == {"float": pl.Float64, "int": pl.Int64}[kind]
        assert values.to_list() == expected
        assert wrong.to_list() == [t is not None and e is None for t, e in zip(texts, expected, strict=True)]


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize(
    "text", ["5", " 5\t", "-0", "007", "0x1F", "0xfFFFFFFFFFFFFFFF", "-0x1", "0x", "1e3", "9223372036854775808", "1_0"]
)
def test_a_block_read_as_text_holds_the_numbers_that_a_reader_of_csv_finds(kind, text):
    read = csv.ConvertOptions(column_types={"x": {"int": pa.int64(), "float": pa.float64()}[kind]}, null_values=[])
    try:
        expected = csv.read_csv(pa.py_buffer(f"x,y\n{text},\n".encode()), convert_options=read)["x"].to_pylist()
    except pa.ArrowInvalid:
        expected = [None]
    assert numbers(pl.Series([text]), kind)[0].to_list() == expected


# Text


CELLS = st.lists(st.none() | st.sampled_from(["a", " a", "a ", "", " ", "NA", " NA", "\tb", "ä"]), max_size=12)
FORMATS = st.builds(Format, trim=st.booleans(), missing=st.sampled_from([[], [""], ["", "NA"], ["NA", "a"]]))


@settings(max_examples=examples(200), deadline=None)
@given(CELLS, FORMATS, st.booleans())
def test_spaces_and_missing_markers_are_those_of_a_loop_also_in_codes(texts, form, large):
    stripped = [t.strip() if t is not None and form.trim else t for t in texts]
    expected = [None if t in form.missing else t for t in stripped]
    assert cleaned(pl.Series(texts, dtype=pl.String), form).to_list() == expected
    codes = coded(pa.array(texts, pa.large_string() if large else pa.string()), form)
    assert codes.to_pylist() == expected
    assert codes.dictionary.null_count == 0


def test_a_key_that_is_also_a_feature_is_the_same_text_as_both_whatever_stands_around_it():
    around = [chr(code) for code in range(1, 0x3100)]
    texts, form = [f"{char}a b{char}" for char in around], Format(trim=True)
    plain = cleaned(pl.Series(texts), form).to_list()
    assert coded(pa.array(texts), form).to_pylist() == plain
    assert {char for char, text in zip(around, plain, strict=True) if text == "a b"} >= {" ", "\t", "\u00a0", "\u3000"}
    assert plain[around.index("a")] == "aa ba"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([3, None, -3, 3]), ["3", None, "-3", "3"]),
        (pl.Series([3.5, 3.0, None]), ["3.5", "3.0", None]),
        (pl.Series([True, None, False]), ["true", None, "false"]),
        (pl.Series(["ä", None, "", "ä"]), ["ä", None, "", "ä"]),
        (pl.Series([None, None]), [None, None]),
        (pl.Series([], dtype=pl.Int64), []),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([1, None, 1]), ["1", None, "1"]),
    ],
)
def test_any_column_can_be_ids(values, expected):
    found = as_ids(values)
    assert pa.types.is_dictionary(found.type)
    assert found.to_pylist() == expected
