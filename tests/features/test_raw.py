"""Raw columns to typed rows, features and labels, against a loop over rows that knows nothing of polars."""

import json
import math
import re
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.parse.raw import ROW_ID, SPLIT, Parsed, Typed, code_columns, parse, type_columns
from features.schema.schema import Schema

CONTENT: dict[str, Any] = {
    "source": {
        "files": "log.csv",
        "trim": True,
        "missing": ["", "NA"],
        "timezone": "Europe/Berlin",
        "types": {"qty": "int"},
        "key": "id",
        "outcomes": {
            "click": {"files": "click.csv", "key": "id", "columns": {"dwell": "float", "place": "string"}},
            "buy": {"files": "buy.csv", "key": "id"},
        },
        "times": {"time": "index"},
        "derived": {"hour": "CAST(FLOOR(time / 3600) % 24 AS BIGINT)", "shout": "UPPER(\"user\") || '!'"},
    },
    "dense": {"price": {}},
    "categorical": {"user": {}, "hour": {}, "shout": {}},
    "bag": {"tags": {"max_length": 2}},
    "tasks": {
        "click": {"kind": "binary", "label": "click"},
        "buy": {"kind": "binary", "label": "buy", "observed_when": "click"},
        "stars": {"kind": "binary", "label": "stars = '5'", "observed_when": "qty > 2"},
        "share": {"kind": "binary", "label": "qty / 4.0", "observed_when": "\"user\" <> '?'"},
        "dwell": {"kind": "regression", "label": "LN(1 + click_dwell)", "observed_when": "click_place = 'top'"},
    },
    "weight": "CASE WHEN qty IS NULL THEN 1 ELSE qty * 0.5 END",
    "event_time": "time",
    "split": {"by": "time", "valid_from": "1970-01-01T01:00", "test_from": "1970-01-01T02:00"},
}
SCHEMA = Schema.parse(CONTENT, where="mine.yaml")

CELLS = {
    "price": ["5", " 5 ", "NA", "", "-1.5e2", ".5", "x", "inf", "nan", "1e400", "1e200", "5,0"],
    "qty": ["3", "4", "NULL", " 1 ", "+2", "0", "NA", "", "-1", "9", "1.0", "0x3", "99999999999999999999", "three"],
    "time": ["0", "3599", "3600", "7199", " 7200", "90000", "-1", "", "noon", "1d3", "1970-01-01 02:00", "1970-01-01Z"],
    "id": ["a", " a", "b", "c", "", "NA", "none"],
    "user": ["u", " u ", "", "NA", "ü", "'", "?"],
    "stars": ["5", " 5", "4", "NA", ""],
    "tags": ["p|q", "p||p|q", "", "NA", " q ", "|"],
}
ROWS = st.lists(st.fixed_dictionaries({c: st.sampled_from(cells) for c, cells in CELLS.items()}), max_size=30)
CLICK = {"a": {"dwell": 3.0, "place": "top"}, "b": {"dwell": 7.5, "place": "side"}}
BUY = {"a", "c"}

INTEGER = re.compile(r"[+-]?[0-9]+|0x[0-9a-f]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MOMENTS = {"1970-01-01 02:00": 3600, "1970-01-01Z": 0}  # Berlin was an hour ahead of UTC
WORDS = {"price": "a number", "qty": "an integer", "time": "a time (of other forms than ISO 8601: set source.times)"}


def plain_number(column: str, cell: str) -> float | None:
    """None where the cell is none of what the column holds."""
    if column == "time" and cell in MOMENTS:
        return MOMENTS[cell]
    if column != "price":
        value = int(cell, 0) if INTEGER.fullmatch(cell) else None
        return value if value is not None and -(1 << 63) <= value < 1 << 63 else None
    value = float(cell) if NUMBER.fullmatch(cell) else None
    return value if value is not None and math.isfinite(value) else None


def plain_typed(raw: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    """One row's cells, and what is wrong with the first of them that is wrong."""
    row: dict[str, Any] = {c: None if v.strip() in ("", "NA") else v.strip() for c, v in raw.items()}
    wrong = None
    for column in (c for c in row if c in WORDS):
        cell = row[column]
        cell = None if cell in ("nan", "NULL") else cell
        row[column] = None if cell is None else plain_number(column, cell)
        if cell is not None and row[column] is None:
            wrong = wrong or f"{column}: '{cell}' is not {WORDS[column]}"
    return row, wrong


def plain_row(cells: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The features and labels of typed cells as CONTENT says, and all that is wrong with them."""
    wrong, qty, time, user, stars = [], cells["qty"], cells["time"], cells["user"], cells["stars"]
    click = CLICK.get(cells["id"])
    row = {name: cells[name] for name in ("price", "user")}
    row["tags"] = [tag for tag in (cells["tags"] or "").split("|") if tag][:2]
    row["shout"] = None if user is None else user.upper() + "!"
    row["label.click"] = float(click is not None)
    row["label.buy"] = float(cells["id"] in BUY) if click else None
    row["label.stars"] = None if stars is None or qty is None or qty <= 2 else float(stars == "5")
    row["label.share"] = None if qty is None or user in (None, "?") else qty / 4
    row["label.dwell"] = math.log1p(click["dwell"]) if click and click["place"] == "top" else None
    row["weight"] = 1.0 if qty is None else qty * 0.5
    if cells["price"] is not None and abs(cells["price"]) > float(np.finfo(np.float32).max):
        wrong.append("price: ")
    if row["label.share"] is not None and not 0 <= row["label.share"] <= 1:
        wrong.append("tasks.share: ")
    if row["weight"] < 0:
        wrong.append("weight: ")
    if cells["id"] is None:
        wrong.append("id: missing key")
    if time is None:
        return row, [*wrong, "split: its key or time is missing", "time: missing event time"]
    row["event_time"] = time
    row["hour"] = str(int(math.fmod(time // 3600, 24)))  # the sign of SQL's % is that of the dividend
    row[SPLIT] = 0 if time < 3600 else 1 if time < 7200 else 2
    return row, wrong


def typed(schema: Schema, columns: dict[str, Any], row: int = 0) -> Typed:
    """Typed rows; the lines are 3, 5, 7 and so on."""
    table = pa.table({c: columns[c] for c in schema.raw_columns})
    types = {c: schema.raw_types.get(c, "string") for c in schema.raw_columns}
    line = 3 + 2 * (np.arange(table.num_rows) + row)
    return type_columns(table, types, code_columns(schema), schema.source, line, row)


def text(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, pa.Array]:
    return {c: pa.array([row[c] for row in rows], pa.string()) for c in columns}


def joined(rows: pa.Table) -> pl.DataFrame:
    """What the outcomes add to rows."""
    keys = rows["id"].to_pylist()
    columns = {
        "click": [key in CLICK for key in keys],
        "click_count": [int(key in CLICK) for key in keys],
        "click_dwell": [CLICK.get(key, {}).get("dwell") for key in keys],
        "click_place": [CLICK.get(key, {}).get("place") for key in keys],
        "buy": [key in BUY for key in keys],
    }
    types = dict(zip(columns, [pl.Boolean, pl.Int64, pl.Float64, pl.String, pl.Boolean], strict=True))
    return pl.DataFrame(columns, schema=types)


def agree(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a row is as expected, but for the digits that float32 does not have."""
    about = {n: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for n, value in expected.items()}
    return {name: found[name] for name in expected} == about


@settings(max_examples=examples(150), deadline=None)
@given(ROWS, st.integers(0, 100))
def test_rows_and_letters_are_those_of_a_loop_over_rows(raws, row):
    cells = typed(SCHEMA, text(raws, SCHEMA.raw_columns), row)
    found = parse(SCHEMA, cells.rows, 1000, joined(cells.rows))
    good, bad, untyped = [], [], []
    for index, raw in enumerate(raws):
        raw = {c: raw[c] for c in SCHEMA.raw_columns}
        place, (values, reason) = row + index, plain_typed(raw)
        if reason:
            untyped.append((3 + 2 * place, reason, raw))
            continue
        expected, wrong = plain_row(values)
        if wrong:
            bad.append((3 + 2 * place, wrong, values))
        else:
            good.append(expected | {ROW_ID: 1000 + place})

    assert found.rows.num_rows == len(good)
    assert all(agree(*pair) for pair in zip(found.rows.to_pylist(), good, strict=True))
    assert found.left_out == {}
    assert [(line, reason, json.loads(raw)) for line, reason, raw in cells.bad.iter_rows()] == untyped
    assert found.bad["line"].to_list() == [line for line, _, _ in bad]
    for (_, reason, shown), (_, wrong, values) in zip(found.bad.iter_rows(), bad, strict=True):
        assert any(reason.startswith(w) for w in wrong)
        assert json.loads(shown) == values
    assert "\n" not in "".join([*found.bad["reason"], *cells.bad["reason"]])


def test_columns_have_the_types_that_encoders_and_statistics_need():
    cells = typed(SCHEMA, text([], SCHEMA.raw_columns))
    ids, number = pa.dictionary(pa.int32(), pa.large_string()), pa.float32()
    labels = {f"label.{task}": number for task in SCHEMA.tasks}
    expected = {"price": pa.float64(), "user": ids, "hour": ids, "shout": ids, "tags": pa.large_list(ids), **labels}
    expected |= {"weight": number, "event_time": pa.int64(), ROW_ID: pa.int64(), SPLIT: pa.int8()}
    found = {f.name: f.type for f in parse(SCHEMA, cells.rows, 0, joined(cells.rows)).rows.schema}
    assert {
        n: pa.dictionary(pa.int32(), t.value_type) if pa.types.is_dictionary(t) else t for n, t in found.items()
    } == (expected)


@settings(max_examples=examples(40), deadline=None)
@given(ROWS, st.data())
def test_a_file_read_in_blocks_gives_the_rows_of_the_file_read_at_once(raws, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raws)), max_size=4)))
    rows, bad = {1: [], 2: []}, {1: [], 2: []}
    for way, bounds in ((1, [0, len(raws)]), (2, [0, *cuts, len(raws)])):
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            cells = typed(SCHEMA, text(raws[a:b], SCHEMA.raw_columns), a)
            found = parse(SCHEMA, cells.rows, 50, joined(cells.rows))
            rows[way] += found.rows.to_pylist()
            bad[way] += [*cells.bad.iter_rows(), *found.bad.iter_rows()]
    assert rows[1] == rows[2]
    assert sorted(bad[1]) == sorted(bad[2])


WHOLE = st.none() | st.integers(-9, 9)
X = st.sampled_from([(WHOLE, pa.int64()), (st.none() | st.sampled_from([0.5, -1e30, 1e-3, 7.0, 1e39]), pa.float64())])


@settings(max_examples=examples(60), deadline=None)
@given(X.flatmap(lambda x: st.tuples(st.lists(st.tuples(x[0], WHOLE, WHOLE), max_size=12), st.just(x[1]))))
def test_numbers_give_the_same_rows_whether_they_were_read_as_numbers_or_as_text(log):
    cells, kind = log
    s = schema(
        source={"files": "x", "types": {"q": "int"}}, dense={"x": {}}, weight="1 + q * q", event_time="at",
        tasks={"t": {"kind": "regression", "label": "q"}},
    )  # fmt: skip
    columns = {name: [row[place] for row in cells] for place, name in enumerate(["x", "q", "at"])}
    types = {"x": kind, "q": pa.int64(), "at": pa.int64()}
    numbers = typed(s, {c: pa.array(values, types[c]) for c, values in columns.items()})
    written = {c: [None if v is None else str(v) for v in values] for c, values in columns.items()}
    texts = typed(s, {c: pa.array(values, pa.string()) for c, values in written.items()})
    assert numbers.rows.select(["q", "x", "at"]).equals(texts.rows.select(["q", "x", "at"]))
    first, second = (parse(s, rows, 0) for rows in (numbers.rows, texts.rows))
    assert first.rows.equals(second.rows)
    assert first.bad.equals(second.bad)
    assert first.rows.num_rows + first.bad.height == len(cells)


def schema(**changes: Any) -> Schema:
    content = {
        "source": {"files": "x.csv"},
        "dense": {"x": {}},
        "tasks": {"t": {"kind": "binary", "label": "y = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    return Schema.parse(content | changes, where="mine.yaml")


def parsed(schema: Schema, **columns: Any) -> Parsed:
    """Columns that are not given are full of ones; all cells must be of their types."""
    height = len(next(iter(columns.values())))
    cells = typed(schema, {c: columns.get(c, ["1"] * height) for c in schema.raw_columns})
    assert cells.bad.is_empty()
    return parse(schema, cells.rows, 0)


def test_without_trim_spaces_belong_to_a_text_and_markers_are_whole_values():
    plain = schema(source={"files": "x.csv", "missing": ["?"]}, categorical={"c": {}})
    assert parsed(plain, c=["?", " ?", "", "a "]).rows["c"].to_pylist() == [None, " ?", "", "a "]
    everything = schema(source={"files": "x.csv", "missing": []}, categorical={"c": {}})
    assert parsed(everything, c=["", "?"]).rows["c"].to_pylist() == ["", "?"]


def test_observed_when_hides_a_label_where_it_is_false_or_unknown():
    tasks = {"t": {"kind": "binary", "label": "y = '1'", "observed_when": "o = 'yes'"}}
    found = parsed(schema(tasks=tasks), y=["1", "0", "1", ""], o=["yes", "yes", "", "yes"])
    assert found.rows["label.t"].to_pylist() == [1.0, 0.0, None, None]


def test_an_expression_reads_ids_as_the_text_they_stand_for_and_may_read_no_column_at_all():
    s = schema(
        source={"files": "x", "trim": True, "derived": {"both": "c || '/' || d", "even": "LENGTH(c) % 2"}},
        categorical={"c": {}, "d": {}, "both": {}, "even": {"bins": 2}},
        tasks={"t": {"kind": "binary", "label": "1", "observed_when": "c IN ('a', 'bb')"}},
    )
    c, d = ["a", " a ", "bb", "", "c", "bb"], ["x", "", "x", "x", " y", "y"]
    rows = parsed(s, c=c, d=d).rows
    assert rows["both"].to_pylist() == ["a/x", None, "bb/x", None, "c/y", "bb/y"]
    assert rows["even"].to_pylist() == [1, 1, 0, None, 1, 0]
    assert rows["label.t"].to_pylist() == [1, 1, 1, None, None, 1]


def test_bags_come_from_lists_too_and_histories_from_where_they_were_found():
    s = schema(
        source={"files": "x", "times": {"at": "index"}},
        categorical={"item": {}},
        bag={"tags": {}, "before": {"history": {"user": "u", "item": "item"}, "max_length": 2}},
        event_time="at",
    )
    columns = {"u": ["1", "1"], "item": ["i", "j"], "at": ["5", "6"], "x": ["1", "1"], "y": ["1", "0"]}
    cells = typed(s, columns | {"tags": pa.array([["p", ""], None], pa.list_(pa.string()))})
    found = parse(s, cells.rows, 0, histories={"before": pa.array([["k", "i", "k"], []], pa.large_list(pa.string()))})
    assert found.rows["tags"].to_pylist() == [["p"], []]
    assert found.rows["before"].to_pylist() == [["k", "i"], []]
    assert found.rows["item"].to_pylist() == ["i", "j"]


def test_a_feature_may_have_the_name_of_the_split():
    rows = parsed(schema(dense={"split": {}}), split=["5", "6"], y=["1", "0"]).rows
    assert rows["split"].to_pylist() == [5, 6]
    assert rows[SPLIT].to_pylist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "columns", "reason"),
    [
        ({"weight": "SQRT(x)"}, {"x": ["-1", "4"]}, "weight: NaN is not a number >= 0"),
        ({"weight": "x"}, {"x": ["-1", "4"]}, "weight: -1.0 is not a number >= 0"),
        ({"weight": "x"}, {"x": ["", "4"]}, "weight: missing is not a number >= 0"),
        ({"weight": "1 / x"}, {"x": ["0", "4"]}, "weight: inf is not a number >= 0"),
        ({"tasks": {"t": {"kind": "binary", "label": "w * 1.5"}}},
         {"w": ["1", "0"]}, "tasks.t: 1.5 is not a label in [0, 1]"),
        ({"tasks": {"t": {"kind": "regression", "label": "LN(w)"}}},
         {"w": ["0", "1"]}, "tasks.t: -inf is not a finite label"),
        ({"source": {"files": "x", "derived": {"d": "LN(w)"}, "types": {"w": "float"}}, "dense": {"d": {}}},
         {"w": ["0", "1"]}, "d: -inf is not a finite number"),
        ({"source": {"files": "x", "derived": {"d": "LN(w)"}, "types": {"w": "float"}}, "categorical": {"d": {"bins": 2}}},
         {"w": ["0", "1"]}, "d: -inf is not a finite number"),
        ({}, {"x": ["1e39", "1"]}, "x: 1e+39 is not a finite number"),
        ({"source": {"files": "x", "row_id": "id"}}, {"id": ["", "7"]}, "id: missing row id"),
        ({"source": {"files": "x", "row_id": "id"}}, {"id": ["-1", "7"]}, "id: -1 is not a row id >= 0"),
        ({"split": {"by": "hash", "key": "k", "valid": 0.1, "test": 0.1}},
         {"k": ["", "a"]}, "split: its key or time is missing"),
        ({"event_time": "at"}, {"at": ["", "700000000"]}, "at: missing event time"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_becomes_a_letter_and_its_neighbour_does_not(changes, columns, reason):
    changes = {"source": {"files": "x", "types": {"w": "float"}}} | changes
    found = parsed(schema(**changes), **columns)
    assert found.bad["reason"].to_list() == [reason]
    assert found.bad["line"].to_list() == [3]
    assert found.rows.num_rows == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": {"t": {"kind": "binary", "label": "y"}}}, "tasks.t.label: 'y' is text"),
        (
            {"tasks": {"t": {"kind": "binary", "label": "1", "observed_when": "y"}}},
            "tasks.t.observed_when: 'y' is text",
        ),
        ({"weight": "y"}, "weight: 'y' is text"),
        ({"weight": "y + 1"}, "weight: 'y + 1' cannot be computed"),
        ({"source": {"files": "x", "derived": {"d": "z || 'x'"}}, "dense": {"d": {}}}, "dense.d: column d is String"),
        ({"source": {"files": "x", "types": {"x": "string"}}}, "dense.x: column x is String"),
        ({"event_time": "at", "source": {"files": "x", "types": {"at": "float"}}}, "event_time: column at is Float64"),
        ({"source": {"files": "x", "types": {"id": "string"}, "row_id": "id"}}, "source.row_id: column id is String"),
    ],
)
def test_a_column_of_a_type_that_its_use_cannot_take_stops_the_job_with_its_key(changes, says):
    with pytest.raises(UserError) as caught:
        parsed(schema(**changes), y=["1", "zz"], x=["1", "2"])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
