"""What a schema may say of outcomes: names of their columns, who may read them, and when they are known."""

import copy
from typing import Any

import pytest
from test_schema import BASE, changed, refusal

from features.schema.schema import Schema

KEYS = ["source.key", "source.row_id", "event_time", "split.key"]
TIMED = {"files": "click-*.csv", "key": "id", "time": "at", "columns": {"dwell": "float"}}


def accepted(content: dict[str, Any]) -> Schema:
    return Schema.parse(content, where="mine.yaml")


def keyed(key: str, column: str, derived: dict[str, str] | None = None) -> dict[str, Any]:
    """BASE where a key is another column."""
    split = {"by": "hash", "key": "user", "valid": 0.1, "test": 0.1}
    content = changed("source.derived", BASE["source"]["derived"] | (derived or {}), changed("split", split))
    return changed(key, column, content)


# Names


def test_a_column_that_two_outcomes_or_a_derived_column_add_is_refused():
    stream = {"files": "y", "key": "id"}
    assert "column click_dwell is added twice" in refusal(changed("source.outcomes.click_dwell", stream))
    assert "column click_count is added twice" in refusal(changed("source.derived.click_count", "price + 1"))
    accepted(changed("source.derived.click_counts", "price + 1"))


# Who reads them


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("column", ["click", "click_count", "click_dwell"])
def test_what_an_outcome_adds_cannot_be_what_rows_are_known_by(key, column):
    accepted(keyed(key, "other"))
    said = f"{key} reads {column}, which an outcome adds: it must be a column of the impressions"
    assert said in refusal(keyed(key, column))
    assert said in refusal(keyed(key, "computed", {"computed": f"CAST({column} AS BIGINT) + 1"}))


@pytest.mark.parametrize("key", KEYS)
def test_what_rows_are_known_by_may_be_computed_from_columns_of_theirs(key):
    schema = accepted(keyed(key, "computed", {"computed": "CAST(session AS BIGINT) * 10 + place"}))
    assert {"session", "place"} <= set(schema.raw_columns)
    assert "computed" not in schema.raw_columns


# When they are known


def recalled(when: str | None, **click: Any) -> dict[str, Any]:
    """BASE with a history, of the clicks it reads some settings, and another outcome that never closes."""
    content = changed("source.derived.long", "click_dwell > 3", changed("source.outcomes.click", {**TIMED, **click}))
    content = changed("source.outcomes.buy", {"files": "b", "key": "id", "time": "at"}, content)
    history = {"user": "user", "item": "item"} | ({"when": when} if when else {})
    return changed("bag.recent.history", history, content)


READ_MORE = [
    "NOT click",
    "click_dwell > 3",
    "click_count > 1",
    "long",
    "click AND stars = '5'",
    "click IS NULL",
    "(NOT click)",
    '"click" AND click',
]


@pytest.mark.parametrize("when", ["click", " click ", '"click"', *READ_MORE])
def test_a_history_reads_only_outcomes_whose_time_is_known(when):
    content = recalled(when)
    del content["source"]["outcomes"]["click"]["time"]
    assert "bag recent: its history reads outcome click, which has no time: give it one" in refusal(content)


@pytest.mark.parametrize("when", READ_MORE)
@pytest.mark.parametrize("click", [{}, {"window": "1d", "late": "keep"}])
def test_a_history_that_asks_more_than_whether_an_outcome_happened_needs_a_window_that_closes(when, click):
    message = refusal(recalled(when, **click))
    assert "bag recent: history.when reads more of outcome click than that it happened" in message
    assert "give the outcome a window (and late: drop)" in message
    accepted(recalled(when, window="1d"))


@pytest.mark.parametrize(
    "when", [None, "click", " click\n", '"click"', "(click)", '(("click"))', "`click`", "stars = '5'", "hour > 3"]
)
@pytest.mark.parametrize("click", [{}, {"window": "1d"}, {"window": "1d", "late": "keep"}])
def test_a_history_of_all_rows_or_those_with_an_outcome_needs_no_window(when, click):
    accepted(recalled(when, **click))


def test_every_outcome_that_a_history_reads_needs_a_window():
    assert "of outcome buy than" in refusal(recalled("click OR buy", window="1d"))
    content = copy.deepcopy(recalled("click OR buy", window="1d"))
    content["source"]["outcomes"]["buy"]["window"] = "7d"
    accepted(content)
