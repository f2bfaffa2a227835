"""Raw text to typed rows, against a loop over rows that knows nothing of polars."""

import json
import math
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hashing import plain_hash

from features.errors import UserError
from features.raw import HASH_SPLIT_SEED, ROW_ID, SPLIT, WEIGHT, first_outcomes, parse
from features.schema import Schema

CONTENT: dict[str, Any] = {
    "source": {
        "files": "log.csv",
        "trim": True,
        "missing": ["", "NA"],
        "types": {"qty": "int"},
        "key": "id",
        "outcomes": {
            "click": {"files": "click.csv", "key": "id", "columns": {"dwell": "float", "place": "string"}},
            "buy": {"files": "buy.csv", "key": "id"},
        },
        "derived": {"hour": "CAST(FLOOR(time / 3600) % 24 AS BIGINT)"},
    },
    "dense": {"price": {}},
    "categorical": {"user": {}, "hour": {}},
    "tasks": {
        "click": {"kind": "binary", "label": "click"},
        "buy": {"kind": "binary", "label": "buy", "observed_when": "click"},
        "stars": {"kind": "binary", "label": "stars = '5'", "observed_when": "qty > 2"},
        "share": {"kind": "binary", "label": "qty / 4.0"},
        "dwell": {"kind": "regression", "label": "LN(1 + click_dwell)", "observed_when": "click_place = 'top'"},
    },
    "weight": "CASE WHEN qty IS NULL THEN 1 ELSE qty * 0.5 END",
    "event_time": "time",
    "split": {"by": "time", "valid_from": "1970-01-01T01:00", "test_from": "1970-01-01T02:00"},
}
SCHEMA = Schema.parse(CONTENT, where="mine.yaml")

INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def plain_number(cell: str, kind: str) -> float | None:
    """None where the cell is no number of the kind."""
    if kind == "int":
        value = int(cell) if INTEGER.fullmatch(cell) else None
        return value if value is not None and -(1 << 63) <= value < 1 << 63 else None
    value = float(cell) if NUMBER.fullmatch(cell) else None
    return value if value is not None and math.isfinite(value) else None


def plain_row(raw: dict[str, str], click: dict[str, Any], buy: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """One row as CONTENT says, and all that is wrong with it."""
    row: dict[str, Any] = {c: None if v.strip(" ") in ("", "NA") else v.strip(" ") for c, v in raw.items()}
    wrong = []
    for column, kind in (("price", "float"), ("time", "int"), ("qty", "int")):
        if row[column] is not None:
            number = plain_number(row[column], kind)
            if number is None:
                wrong.append(f"{column}: '{row[column]}' is not {'a number' if kind == 'float' else 'an integer'}")
            row[column] = number
    if wrong:
        return row, wrong
    event = click.get(row["id"])
    clicked, bought, qty, time = event is not None, row["id"] in buy, row["qty"], row["time"]
    if row["price"] is not None and abs(row["price"]) > float(np.finfo(np.float32).max):
        wrong.append(f"price: {row['price']} is not a finite number")
    row["label.click"] = float(clicked)
    row["label.buy"] = float(bought) if clicked else None
    row["label.stars"] = None if row["stars"] is None or qty is None or qty <= 2 else float(row["stars"] == "5")
    row["label.share"] = None if qty is None else qty / 4
    if qty is not None and not 0 <= qty / 4 <= 1:
        wrong.append("tasks.share: ")
    row["label.dwell"] = math.log1p(event["dwell"]) if event and event["place"] == "top" else None
    row["weight"] = 1.0 if qty is None else qty * 0.5
    if row["weight"] < 0:
        wrong.append("weight: ")
    if time is None:
        wrong += ["split: its key or time is missing", "time: missing event time"]
    else:
        row["hour"] = int(math.fmod(time // 3600, 24))  # the sign of SQL's % is that of the dividend
        row["split"] = 0 if time < 3600 else 1 if time < 7200 else 2
    return row, wrong


def text(values: list[dict[str, Any]], columns: list[str]) -> pl.DataFrame:
    return pl.DataFrame({c: [v[c] for v in values] for c in columns}, schema=dict.fromkeys(columns, pl.String))


CELLS = {
    "price": ["5", " 5 ", "NA", "", "-1.5e2", ".5", "x", "inf", "nan", "1e400", "1e200", "5,0"],
    "qty": ["3", "4", " 1 ", "+2", "0", "NA", "", "-1", "9", "1.0", "99999999999999999999", "three"],
    "time": ["0", "3599", "3600", "7199", " 7200", "90000", "-1", "", "noon", "1e3"],
    "id": ["a", " a", "b", "c", "", "NA", "none"],
    "user": ["u", " u ", "", "NA", "ü", "'", "?"],
    "stars": ["5", " 5", "4", "NA", ""],
}
ROWS = st.lists(st.fixed_dictionaries({c: st.sampled_from(cells) for c, cells in CELLS.items()}), max_size=30)
CLICKS = [
    {"id": "a", "dwell": "3", "place": "top"},
    {"id": "b", "dwell": "7.5", "place": "side"},
    {"id": "a", "dwell": "100", "place": "side"},  # second event of a key: does not count
    {"id": "d", "dwell": "1", "place": "top"},
]
EVENTS = {
    "click": first_outcomes(
        text(CLICKS, ["id", "dwell", "place"]), "click", "id", {"dwell": "float", "place": "string"}
    ),
    "buy": first_outcomes(text([{"id": "a"}, {"id": "c"}], ["id"]), "buy", "id", {}),
}


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(0, 100))
def test_rows_and_letters_are_those_of_a_loop_over_rows(raws, row):
    parsed = parse(SCHEMA, text(raws, SCHEMA.raw_columns), EVENTS, row=row, row_id=1000 + row)
    click = {e["id"]: {"dwell": float(e["dwell"]), "place": e["place"]} for e in reversed(CLICKS)}
    good, bad = [], []
    for index, raw in enumerate(raws):
        expected, wrong = plain_row({c: raw[c] for c in SCHEMA.raw_columns}, click, {"a", "c"})
        (bad if wrong else good).append((index, expected, wrong, raw))

    assert parsed.rows[ROW_ID].to_list() == [1000 + row + index for index, *_ in good]
    for found, (_, expected, _, _) in zip(parsed.rows.to_dicts(), good, strict=True):
        assert found[SPLIT] == expected["split"]
        assert found[WEIGHT] == expected["weight"]
        for column in ("price", "qty", "time", "id", "user", "stars", "hour"):
            assert found[column] == expected[column]
        for task in SCHEMA.tasks:
            label = expected[f"label.{task}"]
            assert found[f"label.{task}"] == (None if label is None else pytest.approx(label, rel=1e-6))

    assert parsed.letters["line"].to_list() == [row + index for index, *_ in bad]
    for (_, reason, shown), (_, _, wrong, raw) in zip(parsed.letters.iter_rows(), bad, strict=True):
        assert any(reason.startswith(w) for w in wrong)
        assert json.loads(shown) == {c: raw[c] for c in SCHEMA.raw_columns}
    assert "\n" not in "".join(parsed.letters["reason"])


@settings(max_examples=40, deadline=None)
@given(ROWS, st.data())
def test_a_file_read_in_blocks_gives_the_rows_of_the_file_read_at_once(raws, data):
    whole = parse(SCHEMA, text(raws, SCHEMA.raw_columns), EVENTS, row=0, row_id=50)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raws)), max_size=4)))
    frame = text(raws, SCHEMA.raw_columns)
    parts = [
        parse(SCHEMA, frame.slice(a, b - a), EVENTS, row=a, row_id=50 + a)
        for a, b in zip([0, *cuts], [*cuts, len(raws)], strict=True)
    ]
    assert pl.concat([p.rows for p in parts]).to_dicts() == whole.rows.to_dicts()
    assert pl.concat([p.letters for p in parts]).to_dicts() == whole.letters.to_dicts()


def schema(**changes: Any) -> Schema:
    content = {
        "source": {"files": "x.csv"},
        "dense": {"x": {}},
        "tasks": {"t": {"kind": "binary", "label": "y = '1'"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    return Schema.parse(content | changes, where="mine.yaml")


def parsed(schema: Schema, **columns: list[str]) -> Any:
    height = len(next(iter(columns.values())))
    frame = pl.DataFrame({c: columns.get(c, ["1"] * height) for c in schema.raw_columns})
    return parse(schema, frame, {}, 0, 0)


def test_without_trim_spaces_belong_to_a_value_and_markers_are_whole_values():
    plain = schema(source={"files": "x.csv", "missing": ["?"]}, categorical={"c": {}})
    found = parsed(plain, c=["?", " ?", "", "a "], x=["1", "2", "3", " 4"])
    assert found.rows["c"].to_list() == [None, " ?", ""]
    assert found.letters["reason"].to_list() == ["x: ' 4' is not a number"]
    everything = parsed(schema(source={"files": "x.csv", "missing": []}, categorical={"c": {}}), c=["", "?"])
    assert everything.rows["c"].to_list() == ["", "?"]


def test_observed_when_hides_a_label_where_it_is_false_or_unknown():
    tasks = {"t": {"kind": "binary", "label": "y = '1'", "observed_when": "o = 'yes'"}}
    found = parsed(schema(tasks=tasks), y=["1", "0", "1", ""], o=["yes", "yes", "", "yes"])
    assert found.rows["label.t"].to_list() == [1.0, 0.0, None, None]


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
        ({}, {"x": ["1e39", "1"]}, "x: 1e+39 is not a finite number"),
        ({"source": {"files": "x", "row_id": "id"}}, {"id": ["", "7"]}, "id: missing row id"),
        ({"source": {"files": "x", "row_id": "id"}}, {"id": ["-1", "7"]}, "id: -1 is not a row id >= 0"),
        ({"split": {"by": "hash", "key": "k", "valid": 0.1, "test": 0.1}},
         {"k": ["", "a"]}, "split: its key or time is missing"),
        ({"event_time": "at"}, {"at": ["", "7"]}, "at: missing event time"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_becomes_a_letter_and_its_neighbour_does_not(changes, columns, reason):
    changes = {"source": {"files": "x", "types": {"w": "float"}}} | changes
    found = parsed(schema(**changes), **columns)
    assert found.letters["reason"].to_list() == [reason]
    assert found.letters["line"].to_list() == [0]
    assert found.rows.height == 1


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


# Outcomes


def test_the_first_event_of_a_key_counts_and_events_without_a_key_do_not():
    events = pl.DataFrame({"id": ["b", None, "a", "b", None], "n": ["1", "2", "3", "4", "5"]})
    found = first_outcomes(events, "o", "id", {"n": "int"})
    assert found.to_dicts() == [{"key": "b", "o": True, "o_n": 1}, {"key": "a", "o": True, "o_n": 3}]


def test_an_outcome_that_is_no_number_stops_the_job_with_its_line():
    events = pl.DataFrame({"id": ["b", "a"], "n": ["1", "many"]})
    with pytest.raises(UserError, match=r"outcome o, line 3: n: 'many' is not an integer"):
        first_outcomes(events, "o", "id", {"n": "int"})


def test_outcomes_join_by_text_also_where_the_key_is_a_number_elsewhere():
    s = schema(
        source={"files": "x", "row_id": "id", "key": "id", "outcomes": {"o": {"files": "o", "key": "id"}}},
        tasks={"t": {"kind": "binary", "label": "o"}},
    )
    events = {"o": first_outcomes(pl.DataFrame({"id": ["2"]}), "o", "id", {})}
    found = parse(s, pl.DataFrame({"x": ["1", "1"], "id": ["1", "2"]}), events, 0, 0)
    assert found.rows["label.t"].to_list() == [0.0, 1.0]
    assert found.rows[ROW_ID].to_list() == [1, 2]


# Splits


def test_a_hash_split_sends_a_key_to_one_split_by_its_text_alone():
    s = schema(split={"by": "hash", "key": "k", "valid": 0.2, "test": 0.3})
    keys = [f"user {i % 5000}" for i in range(12_000)]
    found = parsed(s, k=keys, x=[str(i) for i in range(12_000)]).rows[SPLIT].to_list()
    share = {k: plain_hash(k, HASH_SPLIT_SEED) / 2**64 for k in keys}
    assert found == [2 if share[k] < 0.3 else 1 if share[k] < 0.5 else 0 for k in keys]
    rate = np.bincount(found[:5000]) / 5000
    assert np.abs(rate - [0.5, 0.2, 0.3]).max() < 0.03
    assert parsed(s, k=keys[100:90:-1]).rows[SPLIT].to_list() == found[100:90:-1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(0, 30), st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_row_index_split_goes_on_over_blocks(modulo, first, height, random):
    names = {remainder: random.choice(["train", "valid", "test"]) for remainder in range(modulo)}
    remainders = {name: [r for r, n in names.items() if n == name] for name in ("train", "valid", "test")}
    s = schema(split={"by": "row_index", "modulo": modulo, **remainders})
    frame = pl.DataFrame({c: ["1"] * height for c in s.raw_columns}, schema=dict.fromkeys(s.raw_columns, pl.String))
    found = parse(s, frame, {}, row=first, row_id=0).rows[SPLIT].to_list()
    assert found == [("train", "valid", "test").index(names[(first + i) % modulo]) for i in range(height)]


@pytest.mark.parametrize("zone", ["", "+00:00", "+02:00", "-09:30"])
def test_a_split_by_time_is_by_the_moment_in_its_zone_whatever_the_machines(zone, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    s = schema(
        event_time="at",
        split={"by": "time", "valid_from": f"2026-11-07T00:00:00{zone}", "test_from": f"2026-11-08T12:00:00.5{zone}"},
    )
    sign, hours, minutes = (zone[0], *map(int, zone[1:].split(":"))) if zone else ("+", 0, 0)
    offset = timedelta(hours=hours, minutes=minutes) * (1 if sign == "+" else -1)
    valid_from = int((datetime(2026, 11, 7, tzinfo=timezone.utc) - offset).timestamp())
    test_from = int((datetime(2026, 11, 8, 12, tzinfo=timezone.utc) - offset).timestamp())  # and half a second
    times = [valid_from - 1, valid_from, test_from, test_from + 1]
    assert parsed(s, at=list(map(str, times))).rows[SPLIT].to_list() == [0, 1, 1, 2]
