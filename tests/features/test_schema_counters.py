"""What a schema may say of counters: keys that fit together, what they read, who reads them, and their means in encoders."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_schema import changed, refusal

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema

CLICKS = {"files": "click-*.csv", "key": "id", "time": "at", "columns": {"dwell": "float"}}
CTR = {"by": "user", "of": "click", "take": "mean", "window": "7d", "smoothing": 20}


def with_counter(counter: dict[str, Any], **click: Any) -> dict[str, Any]:
    """A schema with this counter of an outcome with these settings, read by a feature."""
    content = changed("source.outcomes.click", {**CLICKS, **click})
    content = changed("source.derived.long", "click_dwell > 3", content)
    content = changed("dense.seen", {}, content)
    return changed("source.counters", {"seen": counter}, content)


def accepted(content: dict[str, Any]) -> Schema:
    return Schema.parse(content, where="mine.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"take": "median"}, "source.counters.seen.take: Input should be 'count', 'sum' or 'mean'"),
        ({"take": "count"}, "take: count counts rows: choose them with when in place of of"),
        ({"of": None}, "take: mean needs of, the expression of a number"),
        ({"decay": "1d"}, "give one of window and decay"),
        ({"take": "sum"}, "smoothing is of take: mean; a sum of few rows"),
        ({"window": 0}, "source.counters.seen.window"),
        ({"decay": -1, "window": None}, "source.counters.seen.decay"),
        ({"smoothing": 0}, "source.counters.seen.smoothing"),
        ({"smoothing": float("inf")}, "source.counters.seen.smoothing"),
        ({"user": "user"}, "unknown key, allowed are by, take, of, when, window, decay, smoothing"),
        ({"of": "SUM(click)"}, "source.counters.seen.of: "),
        ({"when": "click; SELECT 1"}, "source.counters.seen.when: "),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, said):
    assert said in refusal(with_counter(CTR | changes, window="1d"))


def test_columns_that_a_counter_reads_are_read_and_those_that_counters_add_are_not():
    counter = {"by": "session", "take": "sum", "of": "place * 2", "when": "hour > 3"}
    schema = accepted(with_counter(counter))
    assert {"session", "place"} <= set(schema.raw_columns)
    assert "seen" not in schema.raw_columns
    assert "seen" not in schema.raw_types
    assert schema.added_columns["seen"] == "source.counters.seen"
    assert schema.added_columns["click_time"] == "source.outcomes.click"


# What they read


@pytest.mark.parametrize("counter", [CTR, {"by": "user", "take": "count", "when": "click"}])
def test_a_counter_reads_only_outcomes_whose_time_is_known(counter):
    content = with_counter(counter, window="1d")
    accepted(content)
    content["source"]["outcomes"]["click"] = {"files": "c", "key": "id", "columns": {"dwell": "float"}}
    assert "source.counters.seen reads outcome click, which has no time: give it one" in refusal(content)


ABSENCE = [
    {"take": "mean", "of": "click"},
    {"take": "sum", "of": "click_dwell"},
    {"take": "sum", "of": "click + 0"},
    {"take": "sum", "of": "long"},
    {"take": "count", "when": "NOT click"},
    {"take": "mean", "of": "place", "when": "click AND stars = '5'"},
]
PRESENCE = [
    {"take": "sum", "of": "click"},
    {"take": "count", "when": " click"},
    {"take": "mean", "of": "place", "when": "click"},
]


@pytest.mark.parametrize("counter", ABSENCE)
@pytest.mark.parametrize("click", [{}, {"window": "1d", "late": "keep"}])
def test_what_is_not_known_when_an_outcome_happens_needs_a_window_that_closes(counter, click):
    message = refusal(with_counter({"by": "user", **counter}, **click))
    key = "when" if "when" in counter else "of"
    assert f"source.counters.seen.{key} reads more of outcome click than that it happened" in message
    accepted(with_counter({"by": "user", **counter}, window="1d"))


@pytest.mark.parametrize("counter", PRESENCE)
@pytest.mark.parametrize("click", [{}, {"window": "1d", "late": "keep"}])
def test_what_is_known_when_an_outcome_happens_needs_none(counter, click):
    accepted(with_counter({"by": "user", **counter}, **click))


def test_a_counter_needs_an_event_time():
    content = with_counter({"by": "user", "take": "count"})
    del content["source"]["outcomes"], content["source"]["derived"]["long"], content["event_time"]
    content["tasks"] = {"good": content["tasks"]["good"]}
    content["split"] = {"by": "hash", "key": "user", "valid": 0.1, "test": 0.1}
    assert "event_time is missing: source.counters.seen is made of earlier rows" in refusal(content)


# Who reads them, and leaks


def test_what_is_counted_may_be_a_label_but_not_what_a_row_is_looked_up_by():
    accepted(with_counter({"by": "user", "take": "mean", "of": "CAST(stars AS INT)", "when": "stars <> ''"}))
    said = "tasks.good.label uses column stars, which is also read by the feature seen"
    assert said in refusal(with_counter({"by": "stars", "take": "count"}))
    derived = with_counter({"by": "starry", "take": "count"})
    derived["source"]["derived"]["starry"] = "stars || place"
    assert said in refusal(derived)
    hidden = with_counter({"by": "stars", "take": "count"})
    hidden["source"]["derived"]["twice"] = "seen * 2"
    hidden["dense"]["seen"] = {"column": "twice"}
    assert said in refusal(hidden)


@pytest.mark.parametrize("column", ["click", "click_dwell", "long"])
def test_a_row_is_not_looked_up_by_an_outcome(column):
    said = "source.counters.seen.by reads click"
    assert said in refusal(with_counter({"by": column, "take": "count"}, window="1d"))


@pytest.mark.parametrize("key", ["source.key", "source.row_id", "event_time", "split.key"])
def test_rows_are_not_known_by_a_counter(key):
    split = {"by": "hash", "key": "user", "valid": 0.1, "test": 0.1}
    content = changed("split", split, with_counter({"by": "user", "take": "count"}))
    assert f"{key} reads seen, which is a counter" in refusal(changed(key, "seen", content))


def test_counters_and_histories_do_not_read_counters():
    content = with_counter({"by": "user", "take": "count"})
    content["source"]["derived"]["many"] = "seen > 3"
    accepted(content)
    for counter in ({"by": "seen"}, {"by": "many"}, {"by": "user", "when": "seen > 3"}, {"by": "user", "when": "many"}):
        nested = changed("source.counters.other", {"take": "count", **counter}, content)
        assert "source.counters.other reads seen, which is a counter" in refusal(nested)
    for history in ({"user": "seen", "item": "item"}, {"user": "user", "item": "item", "when": "many"}):
        nested = changed("bag.recent", {"table": "item", "history": history}, content)
        assert "bag.recent.history reads seen, which is a counter" in refusal(nested)


@pytest.mark.parametrize("name", ["click", "click_count", "hour"])
def test_a_counter_with_the_name_of_another_column_that_is_added_is_refused(name):
    content = with_counter({"by": "user", "take": "count"})
    content["source"]["counters"][name] = {"by": "user", "take": "count"}
    assert f"column {name} is added twice, by source.outcomes, tables, counters or derived" in refusal(content)


def test_a_counter_with_the_name_of_a_history_is_refused():
    content = with_counter({"by": "user", "take": "count"})
    content = changed("bag.recent", {"table": "item", "history": {"user": "user", "item": "item"}}, content)
    content["source"]["counters"]["recent"] = {"by": "user", "take": "count"}
    assert "source.counters.recent has the name of a bag with a history" in refusal(content)


# Fitted means


def fitted(folder: Path, schema: Schema, means: dict[str, float]) -> Path:
    columns = {name: pa.array([], pa.float64()) for name in schema.dense}
    labels = {name: pa.array([], pa.float32()) for name in ["weight", *(f"label.{task}" for task in schema.tasks)]}
    Encoders.fit(schema, Statistics.of(schema, pa.table(columns | labels)), means).save(folder)
    return folder


def counting(counter: dict[str, Any]) -> Schema:
    content = {
        "source": {"files": "x", "counters": {"seen": counter}},
        "dense": {"seen": {}},
        "tasks": {"t": {"kind": "binary", "label": "stars"}},
        "event_time": "time",
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    return accepted(content)


def test_means_are_saved_with_the_encoders_and_belong_to_their_counters(tmp_path):
    schema = counting({"by": "user", "take": "mean", "of": "stars", "smoothing": 2})
    assert Encoders.load(fitted(tmp_path / "a", schema, {"seen": 0.25}), schema).counter_means == {"seen": 0.25}
    other = counting({"by": "user", "take": "mean", "of": "stars", "smoothing": 3})
    with pytest.raises(UserError, match="were fitted for features"):
        Encoders.load(tmp_path / "a", other)


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({}, "counter_means has none for seen"),
        ({"seen": 0.5, "more": 1.0}, "counter_means has one that the schema does not need"),
        ({"seen": "0.5x"}, "counter_means.seen"),
        ({"seen": 1e999}, "Infinity is no number"),
    ],
)
def test_means_that_do_not_fit_are_refused(means, said, tmp_path):
    schema = counting({"by": "user", "take": "mean", "of": "stars", "smoothing": 2})
    folder = fitted(tmp_path / "a", schema, {"seen": 0.25})
    content = json.loads((folder / "encoders.json").read_text())
    (folder / "encoders.json").write_text(json.dumps(content | {"counter_means": means}))
    with pytest.raises(UserError, match=said):
        Encoders.load(folder, schema)


def test_encoders_without_smoothed_counters_have_no_means(tmp_path):
    schema = counting({"by": "user", "take": "count"})
    folder = fitted(tmp_path / "a", schema, {})
    assert "counter_means" not in json.loads((folder / "encoders.json").read_text())
    assert Encoders.load(folder, schema).counter_means == {}
