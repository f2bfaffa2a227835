"""JSON that was handed over: too deep, too large, with numbers that are none."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from features.errors import UserError
from features.plain_json import parse_json, read_json, validated

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@settings(deadline=None)
@given(value=JSON)
def test_whatever_our_writer_writes_is_read_again(value):
    assert parse_json(json.dumps(value, indent=1).encode(), "a.json") == value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "too large"),
        (b"[%d]" % 2**63, "more than 64 bits"),
        (b"[" + b"9" * 1_000_000 + b"]", "more than 64 bits"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff\xfe", "codec can't decode"),
        (b"", "Expecting value"),
        (b"{\x1b[31m", r"no valid JSON"),
    ],
)
def test_what_is_no_json_is_one_line_of_error(content, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_json(content, "a.json")
    assert str(caught.value).startswith("a.json: no valid JSON")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_records_of_training_may_have_numbers_that_are_not_finite():
    assert math.isnan(parse_json(b'{"loss": NaN}', "train.jsonl", strict=False)["loss"])
    assert parse_json(b'"\\ud83d\\ude00"', "a.json") == "\N{GRINNING FACE}"


@settings(deadline=None, max_examples=200)
@given(content=st.binary() | st.text().map(str.encode))
def test_random_bytes_are_json_or_a_user_error(content):
    try:
        parse_json(content, "a.json")
    except UserError as error:
        said = str(error)
        assert said.isprintable(), said


def test_a_file_that_is_too_large_or_a_link_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(list(range(100))))
    (tmp_path / "link.json").symlink_to("a.json")
    assert len(read_json(tmp_path, "a.json")) == 100
    with pytest.raises(UserError, match="more than the 50"):
        read_json(tmp_path, "a.json", 50)
    with pytest.raises(UserError, match="is a link"):
        read_json(tmp_path, "link.json")


def test_types_are_exact_and_the_place_of_a_fault_is_named_in_few_words():
    class Entry(BaseModel):
        rows: int

    class Content(BaseModel):
        entries: dict[str, Entry]

    assert validated(Content, {"entries": {"a": {"rows": 3}}}, "a.json").entries["a"].rows == 3
    for value in ("3", 3.0, True, None, [3]):
        with pytest.raises(UserError, match=r"^a.json: entries.a.rows: Input should be a valid integer$"):
            validated(Content, {"entries": {"a": {"rows": value}}}, "a.json")
    with pytest.raises(UserError) as caught:
        validated(Content, {"entries": {"\x1b" * 10_000: 3}}, "a.json")
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()
