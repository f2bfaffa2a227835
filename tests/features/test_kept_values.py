"""Kept columns of a block: each value against a plain conversion of its own, and what no dataset holds."""

import datetime
import math
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_schema import BASE, changed

from features.errors import UserError
from features.parse.kept import kept_columns
from features.parse.raw import code_columns, parse, type_columns
from features.schema.schema import Schema

DERIVED = {
    "initial": 'SUBSTR("user", 1, 1)', "cheap": "price < 1", "half": "price / 2", "ratio": "price / price",
    "whole": "CAST(price AS BIGINT)", "day": "DATE(stars, '%Y-%m-%d')", "moment": "CAST(micros AS TIMESTAMP)",
    "exact": "CAST(price AS DECIMAL(10, 2))", "none": "NULL",
}  # fmt: skip
NAMES = ["user", "price", "time", "unread", "typed", *DERIVED]
CONTENT = changed("source.derived", BASE["source"]["derived"] | DERIVED)
CONTENT = changed("keep", NAMES, changed("source.types", {"typed": "int", "micros": "int"}, CONTENT))
SCHEMA = Schema.parse(CONTENT, where="mine.yaml")
EPOCH = datetime.datetime(1970, 1, 1)
WORDS = st.sampled_from(["", "x", "7.0", "007", "ä ü", "日本", "a|b"])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user": WORDS,
            "unread": WORDS,
            "price": st.sampled_from(["", "0", "0.25", "-3.5", "12"]),
            "typed": st.sampled_from(["", "-5", "9223372036854775807", "0x10"]),
            "stars": st.sampled_from(["", "1969-12-31", "2026-11-07"]),
            "micros": st.sampled_from(["", "1794045600900000", "-500000", "-1000000"]),
        }
    ),
    min_size=1,
    max_size=8,
)


def expected(row: dict[str, str]) -> dict[str, Any]:
    """A row's kept values by plain Python."""
    price = None if row["price"] == "" else float(row["price"])
    day = None if row["stars"] == "" else (datetime.datetime.fromisoformat(row["stars"]) - EPOCH).days * 86_400
    moment = None if row["micros"] == "" else int(row["micros"]) // 1_000_000
    return {
        "user": row["user"] or None, "unread": row["unread"] or None, "price": price, "time": 1_767_225_600,
        "typed": None if row["typed"] == "" else int(row["typed"], 0), "initial": row["user"][:1] or None,
        "cheap": None if price is None else int(price < 1), "half": None if price is None else price / 2,
        "ratio": 1.0 if price else None,  # 0 / 0 is no value
        "whole": None if price is None else math.trunc(price), "day": day, "moment": moment,
        "exact": price, "none": None,
    }  # fmt: skip


@given(rows=ROWS)
def test_each_value_is_what_a_plain_conversion_gives_and_keeps_its_place(rows: list[dict[str, str]]):
    cells = {name: [row.get(name, "x") for row in rows] for name in SCHEMA.raw_columns}
    cells |= {"time": ["2026-01-01T00:00:00Z"] * len(rows), "id": [str(number) for number in range(len(rows))]}
    types = {name: SCHEMA.raw_types.get(name, "string") for name in SCHEMA.raw_columns}
    lines = np.arange(len(rows)) + 2
    typed = type_columns(pa.table(cells), types, code_columns(SCHEMA), SCHEMA.source, lines, 0)
    none_B = pl.Series([False] * len(rows))
    joined = pl.DataFrame(
        {"click": none_B, "click_count": none_B.cast(pl.Int64), "click_dwell": none_B.cast(pl.Float64)}
    )
    found = parse(SCHEMA, typed.rows, 0, joined)
    assert not found.bad.height
    kept = found.rows.select(list(SCHEMA.kept))
    assert dict(zip(kept.column_names, kept.schema.types, strict=True)) == SCHEMA.kept
    assert kept.to_pylist() == [{f"raw.{name}": expected(row)[name] for name in NAMES} for row in rows]


def given_values(values: Any, name: str = "user", content: dict[str, Any] = BASE) -> pa.Array:
    schema = Schema.parse(changed("keep", [name], content), where="mine.yaml")
    return kept_columns(schema, len(values), lambda _: values)[f"raw.{name}"]


def test_codes_of_ids_are_the_texts_they_stand_for_and_nan_is_missing():
    codes = pa.DictionaryArray.from_arrays(
        pa.array([1, None, 0, 1], pa.int32()), pa.array(["a", "ä"], pa.large_string())
    )
    assert given_values(codes).equals(pa.array(["ä", None, "a", "ä"], pa.large_string()))
    assert given_values(pa.array([1.5, math.nan, None, math.inf]), "price").to_pylist() == [1.5, None, None, math.inf]


@pytest.mark.parametrize("lists", [pa.array([["a"], None]), pl.Series([["a"], []]), pa.array([{"a": 1}])])
def test_lists_and_records_are_refused_with_the_key(lists):
    with pytest.raises(UserError, match="keep: column user holds lists: keep a column of one value a row"):
        given_values(lists)


def test_a_number_beyond_int64_is_refused_with_the_key():
    content = changed("source.derived.large", "CAST(price AS BIGINT UNSIGNED)")
    with pytest.raises(UserError, match="keep: column large: "):
        given_values(pl.Series([2**63], dtype=pl.UInt64), "large", content)


def test_columns_that_are_not_read_are_null():
    schema = Schema.parse(changed("keep", ["user", "price", "time"]), where="mine.yaml")
    part = schema.model_copy(update={"keep": ["price"]})
    part.__dict__["kept"] = schema.kept
    found = kept_columns(part, 2, lambda _: pa.array([1.0, 2.0]))
    assert found == {
        "raw.user": pa.nulls(2, pa.large_string()), "raw.price": pa.array([1.0, 2.0]), "raw.time": pa.nulls(2, pa.int64()),
    }  # fmt: skip
