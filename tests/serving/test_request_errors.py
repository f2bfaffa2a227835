"""Requests that are no rows of a log are refused with the field and the row, whatever JSON they are."""

from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from request_log import same

from features.errors import UserError
from features.fit.encoders import Encoders
from features.kinds.moments import Moments
from features.schema.schema import Schema
from pipeline.serving import values
from pipeline.serving.requests import Requests
from pipeline.serving.row_error import RowError

SCHEMA = Schema.parse(
    {
        "source": {
            "files": "log.csv", "row_id": "id", "key": "id", "trim": True, "types": {"qty": "int"}, "columns": None,
            "outcomes": {"click": {"files": "clicks.csv", "key": "id"}},
            "tables": {"item": {"files": "items.csv", "key": "item", "columns": {"cost": "float"}}},
            "counters": {"shows": {"by": "user", "take": "count"}},
            "derived": {"hour": "(at // 3600) % 24", "root": "LN(price)", "place": "CAST(\"spot\" AS BIGINT)"},
        },
        "dense": {"price": {}, "qty": {}, "shows": {}, "root": {}, "item_cost": {}},
        "categorical": {
            "user": {"hash": 50}, "age_bin": {"column": "age", "bins": 3}, "hour": {"hash": 24}, "place": {"hash": 9},
        },
        "bag": {"tags": {"hash": 50}, "seen": {"hash": 50, "history": {"user": "user", "item": "item"}}},
        "vector": {"picture": {"length": 2}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "user", "valid": 0.1, "test": 0.1},
    },
    "errors.yaml",
)  # fmt: skip
MOMENTS = {name: Moments(9, 1.0, 9.0) for name in SCHEMA.dense}
REQUESTS = Requests(SCHEMA, Encoders(SCHEMA, {}, MOMENTS, {"age_bin": [1.0, 2.0, 3.0, 4.0]}))
PAIRED = Schema.parse(
    {
        "source": {"files": "log.csv", "derived": {"pair": '"query" || "item"'}},
        "categorical": {"pair": {"hash": 50}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    },
    "pairs.yaml",
)
PAIRS = Requests(PAIRED, Encoders(PAIRED, {}, {}, {}))
GOOD = {"user": "u", "price": 2.0, "age": 30, "at": 1_700_000_000}
LONG = "x" * ((1 << 20) + 1)

# A value of the third of four candidates, and what the error says of it.
BAD: list[tuple[str, Any, str]] = [
    ("price", "x", "price: 'x' is not a number"),
    ("price", float("inf"), "price: 'inf' is not a number"),
    ("price", 1e39, "price: 1e+39 is not a finite number"),
    ("price", [1.0], "price: is a list, where one value belongs"),
    ("price", {"a": 1}, "price: is an object, where one value belongs"),
    ("price", 0, "price: root: -inf is not a finite number"),
    ("age", "-Infinity", "age: '-Infinity' is not a number"),
    ("age", "old", "age: 'old' is not a number"),
    ("qty", 1.5, "qty: '1.5' is not an integer"),
    ("qty", 1 << 63, "qty: is a number of more than 64 bits: write it as text"),
    ("user", 1 << 64, "user: is a number of more than 64 bits: write it as text"),
    ("user", 7.5, "user: holds 7.5, which is no id. Make it whole"),
    ("user", Decimal("7.5"), "user: holds 7.5, which is no id. Make it whole"),
    ("user", 1e300, "user: holds 1e+300, of which a float has lost the last digits. Write it as an integer"),
    ("user", "\ud800", "user: is no text: it has half of a character (a lone surrogate)"),
    ("user", LONG, "user: has a text of 1,048,577 bytes, allowed are 1,048,576"),
    ("user", ["a"], "user: is a list, where one value belongs"),
    ("user", {1}, "user: is of type set, where one value belongs"),
    ("user", b"\xff", "user: is of type bytes, where one value belongs"),
    ("tags", ["a", 1 << 63], "tags: item is a number of more than 64 bits"),
    ("tags", ["a", 0.5], "tags: item holds 0.5, which is no id"),
    ("tags", [["a"]], "tags: item is a list, where one value belongs"),
    ("tags", ["a"] * 100_001, "tags: has 100,001 items, allowed are 100,000"),
    ("tags", ["a", LONG], "tags: item has a text of 1,048,577 bytes"),
    ("seen", ["a", 0.5], "seen: item holds 0.5, which is no id"),
    ("picture", [1, 2, 3], "picture: 3 numbers, it must have 2"),
    ("picture", [1, "x"], "picture: 'x' is not a finite number"),
    ("picture", [1, float("nan")], "picture: 'nan' is not a finite number"),
    ("shows", "many", "shows: 'many' is not a number"),
    ("item_cost", "dear", "item_cost: 'dear' is not a number"),
    ("at", "yesterday", "at: 'yesterday' is not a time"),
    ("at", 1_700_000_000_000, "at: 1700000000000 is not between 1990 and 2100 in seconds since 1970: milliseconds?"),
    ("spot", "here", "spot: source.derived.place: 'CAST(\"spot\" AS BIGINT)' cannot be computed: conversion"),
    ("hour", 3, "hour: is computed from at: give these in place of it"),
    ("prize", 3, "prize: is no column of the schema (did you mean price?)"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value", "message"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_a_value_that_no_log_could_have_is_refused_with_its_row_and_field(
    column: str, value: Any, message: str
) -> None:
    good = GOOD | {"tags": ["a"], "spot": "7", "picture": [0, 1]}
    rows = [good, good, good | {column: value}, good]
    for alike in (rows, [rows[0], {"user": "v"}, *rows[2:]]):  # rows of the same keys, and others
        with pytest.raises(RowError) as caught:
            REQUESTS.encode(alike, where="candidates")
        assert str(caught.value).startswith(f"candidates[2].{message}")
        assert (caught.value.row, caught.value.field) == (2, message.split(":")[0])
        assert len(str(caught.value)) < 600
        assert "\n" not in str(caught.value)
    user = {name: value for name, value in rows[2].items() if name not in ("price", "qty")}
    if column in user:
        with pytest.raises(UserError) as of_user:
            REQUESTS.encode([{"price": 2.0, "qty": 1}] * 3, user=user)
        assert str(of_user.value).startswith(f"user.{message}")
    assert len(REQUESTS.encode([good])) == 1


def test_what_is_no_request_is_refused() -> None:
    table = pa.table([[1.0], [2.0]], ["price", "price"])
    cases: list[tuple[Any, Any, str]] = [
        ({1}, None, "rows: give a list of mappings or a table, not a set"),
        ("price", None, "rows: give a list of mappings or a table, not a str"),
        ([GOOD, 3], None, "rows[1]: is no mapping of columns to values, but of type int"),
        ([{5: 1}, GOOD], None, "rows[0]: 5 is no name of a column, but of type int"),
        ([{"id": 5}], None, "rows: none has a column that is read, such as price, qty"),
        ([GOOD], {"age": 5, "price": 1}, "age is given in user and in rows: leave it out of one of them"),
        ([{"price": 5}], {"aged": 5}, "user.aged: is no column of the schema (did you mean age?)"),
        ([{"price": 5}], 7, "user: is no mapping of columns to values, but of type int"),
        (table, None, "rows.price: stands twice"),
        (pa.table({"price": ["7", "x"]}), None, "rows[1].price: 'x' is not a number"),
        (pa.table({"user": [1.0, 2.5]}), None, "rows[1].user: holds 2.5, which is no id"),
        (pa.table({"user": [["a"], ["b"]]}), None, "rows[0].user: holds lists: make it a bag"),
        (pa.table({"user": [{"a": 1}]}), None, "rows[0].user: is struct<a: int64>, which cannot be read as text"),
        (pa.table({"age": pa.array([b"7", b"x", b"\xff"])}), None, "rows[1].age: 'x' is not a number"),
        (pa.table({"seen": [{"a": 1}]}), None, "rows[0].seen: is struct<a: int64>, which cannot be read as text"),
        (pa.table({"prices": [1]}), None, "rows.prices: is no column of the schema (did you mean price?)"),
    ]
    for rows, user, message in cases:
        with pytest.raises(UserError) as caught:
            REQUESTS.encode(rows, user=user)
        assert str(caught.value).startswith(message)


def test_columns_that_are_not_read_may_be_there_and_others_where_the_caller_says_so() -> None:
    plain = REQUESTS.encode([GOOD])
    assert REQUESTS.encode([GOOD | {"id": 7, "click": object()}]).dense_BD.equal(plain.dense_BD)
    for rows in ([GOOD | {"other": 7}], pa.table({name: [value] for name, value in (GOOD | {"other": 7}).items()})):
        assert REQUESTS.encode(rows, extra=True).dense_BD.equal(plain.dense_BD)
        with pytest.raises(UserError, match=r"other: is no column of the schema"):
            REQUESTS.encode(rows)
    computed = pa.table({name: [value] for name, value in (GOOD | {"hour": 7}).items()})
    assert same(REQUESTS.encode(computed, extra=True), plain)
    assert len(REQUESTS.encode([])) == 0


def test_items_of_mixed_types_are_checked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    check = values.check_ids
    monkeypatch.setattr(values, "check_ids", lambda items, name: (calls.append(len(items)), check(items, name))[1])
    REQUESTS.encode([{"tags": [1.0, "a"] * 5000}])
    assert len(calls) == 1
    with pytest.raises(RowError, match=r"rows\[1\].tags: item holds 0.5, which is no id"):
        REQUESTS.encode([{"tags": ["a"]}, {"tags": [1.0, "a"] * 5000 + [0.5] + [2.0, 0.25] * 99}])
    assert len(calls) < 40


def test_a_text_of_the_user_is_refused_before_it_is_repeated() -> None:
    for size, rows, message in ((1 << 20, 65, "is repeated for 65 rows"), ((1 << 20) + 1, 65, "has a text of")):
        with pytest.raises(RowError, match=f"user.query: {message}"):
            PAIRS.encode([{"item": "i"}] * rows, {"query": "x" * size})
    assert len(PAIRS.encode([{"item": "i"}] * 5, {"query": "x" * (1 << 20)})) == 5


TEXTS = st.text(st.characters(categories=["L", "N", "P", "Z", "Cs", "Cc"]), max_size=4) | st.sampled_from(
    ["1", "-0", "7.0", "1e999", "0x1F", "NaN", "", "2026-11-07", "1700000000", "inf", "99999999999999999999"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-5, 5) | st.floats() | TEXTS
NESTED = st.recursive(SCALARS, lambda x: st.lists(x, max_size=2) | st.dictionaries(TEXTS, x))
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | NESTED
ROWS = st.lists(st.dictionaries(st.sampled_from(REQUESTS.columns), VALUES, max_size=6), max_size=4)


@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(ROWS, st.none() | st.dictionaries(st.sampled_from(REQUESTS.columns), VALUES, max_size=4))
def test_any_json_is_encoded_or_refused_with_an_error_for_its_user(rows: Any, user: Any) -> None:
    try:
        found = REQUESTS.encode(rows, user)
    except UserError as error:
        str(error).encode()
        return
    assert len(found) == len(rows)
    assert found.dense_BD.isfinite().all()
    assert (found.id_BF >= 0).all()
    assert all(int(ids.length_R.sum()) == len(ids.id_V) for ids in found.lists.values())
