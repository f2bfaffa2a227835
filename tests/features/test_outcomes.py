"""The join of outcomes against loops over impressions and events, one pair at a time."""

import itertools
from collections import Counter
from typing import Any

import polars as pl
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.join.outcomes import JOIN_STATUSES, join
from features.source import Outcome

Row = dict[str, Any]
TYPES = {"at": pl.Int64, "n": pl.Int64, "x": pl.Float64, "place": pl.String}
KEYS = {pl.Int64: [7, -5, 0, 10**15], pl.String: ["a", "b", "", "ä"]}
TIMES = st.integers(0, 6)
EVENT = {
    "at": TIMES,
    "n": st.sampled_from([None, 1, 2, -3]),
    "x": st.sampled_from([None, 0.5, -2.25]),
    "place": st.sampled_from([None, "top", ""]),
}


@st.composite
def logs(draw: st.DrawFn) -> tuple[Any, list[Row], list[Row]]:
    """The type of the keys, impressions and events; few keys and times, so that ties and duplicates abound."""
    kind = draw(st.sampled_from(list(KEYS)))
    key = st.sampled_from(KEYS[kind])
    impression = st.fixed_dictionaries({"key": st.none() | key, "time": st.none() | TIMES})
    impressions = draw(st.lists(impression, max_size=8))
    events = draw(st.lists(st.fixed_dictionaries({"key": key, **EVENT}), max_size=10))
    again = draw(st.lists(st.sampled_from(events), max_size=3)) if events else []
    return kind, impressions, draw(st.permutations(events + again))


def took_place(event: Row, impression: Row, outcome: Outcome) -> bool:
    """Whether the event is one of the impression's."""
    if impression["key"] is None or event["key"] != impression["key"]:
        return False
    if outcome.time is None:
        return True
    if impression["time"] is None:
        return False
    after = event["at"] - impression["time"]
    return after >= 0 and (outcome.window is None or outcome.late == "keep" or after <= outcome.window)


def taken(events: list[Row], column: str, take: str) -> Any:
    """A column of events that are in order."""
    if take in ("first", "last"):
        return events[0 if take == "first" else -1][column] if events else None
    known = [event[column] for event in events if event[column] is not None]
    return {"sum": sum, "min": min, "max": max}[take](known) if known else None


def plain_columns(outcome: Outcome, impression: Row, events: list[Row]) -> Row:
    ours = [event for event in events if took_place(event, impression, outcome)]
    if outcome.time:
        ours.sort(key=lambda event: event["at"])
    row = {"o": bool(ours), "o_count": len(ours)}
    if outcome.time:
        row["o_time"] = taken(ours, "at", "last" if outcome.take == "last" else "first")
    return row | {f"o_{column}": taken(ours, column, outcome.take) for column in outcome.columns}


def plain_fate(outcome: Outcome, event: Row, impressions: list[Row]) -> str:
    same = [i for i in impressions if i["key"] == event["key"] and (i["time"] is not None or not outcome.time)]
    if any(took_place(event, impression, outcome) for impression in same):
        return "joined"
    if not same:
        return "unmatched"
    return "early" if all(impression["time"] > event["at"] for impression in same) else "late"


def frame(rows: list[Row], types: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame({name: [row[name] for row in rows] for name in types}, schema=types)


TIMINGS = {
    "no time": {},
    "time": {"time": "at"},
    "window": {"time": "at", "window": 2},
    "window, late ones kept": {"time": "at", "window": 2, "late": "keep"},
}
WAYS = list(itertools.product(TIMINGS, ["first", "last", "sum", "min", "max"], ["drop", "keep"]))


@pytest.mark.parametrize(("timing", "take", "duplicates"), WAYS)
@settings(max_examples=examples(25), deadline=None)
@given(logs())
def test_every_impression_has_the_outcomes_and_every_outcome_the_fate_of_a_loop_over_pairs(
    timing, take, duplicates, log
):
    kind, impressions, events = log
    columns = {"n": "int", "x": "float"} | ({"place": "string"} if take in ("first", "last") else {})
    outcome = Outcome(files="o.csv", key="key", columns=columns, take=take, duplicates=duplicates, **TIMINGS[timing])
    read = ["key", *outcome.types]
    found = join(
        "o",
        outcome,
        frame(impressions, {"key": kind, "time": pl.Int64}),
        frame(events, {name: {"key": kind, **TYPES}[name] for name in read}),
    )

    events = [{name: event[name] for name in read} for event in events]
    unique = events if duplicates == "keep" else [e for i, e in enumerate(events) if e not in events[:i]]
    assert found.columns.to_dicts() == [plain_columns(outcome, impression, unique) for impression in impressions]
    join_statuses = Counter(plain_fate(outcome, event, impressions) for event in unique)
    assert found.join_statuses == {fate: join_statuses[fate] for fate in JOIN_STATUSES} | {
        "duplicate": len(events) - len(unique)
    }
    assert sum(found.join_statuses.values()) == len(events)
    for column, kind_of in columns.items():
        assert (
            found.columns[f"o_{column}"].dtype == {"int": pl.Int64, "float": pl.Float64, "string": pl.String}[kind_of]
        )


def joined(outcome: Outcome, shown: list[tuple[Any, int]], happened: list[tuple]) -> Any:
    impressions = pl.DataFrame(shown, schema={"key": pl.String, "time": pl.Int64}, orient="row")
    types = {"key": pl.String, **{name: TYPES[name] for name in outcome.types}}
    return join("o", outcome, impressions, pl.DataFrame(happened, schema=types, orient="row"))


def test_both_ends_of_a_window_belong_to_it_and_the_seconds_around_it_do_not():
    outcome = Outcome(files="o", key="key", time="at", window="1h", take="last")
    found = joined(outcome, [("a", 10_000)], [("a", at) for at in (9_999, 10_000, 13_600, 13_601)])
    assert found.columns.to_dicts() == [{"o": True, "o_count": 2, "o_time": 13_600}]
    assert found.join_statuses == {"joined": 2, "duplicate": 0, "early": 1, "late": 1, "unmatched": 0}


def test_an_outcome_belongs_to_every_impression_in_whose_window_it_is_but_counts_once_as_joined():
    outcome = Outcome(files="o", key="key", time="at", window=10)
    found = joined(outcome, [("a", 5), ("a", 0), ("a", 50), ("b", 5)], [("a", 8), ("a", 30)])
    assert found.columns["o_count"].to_list() == [1, 1, 0, 0]
    assert found.columns["o_time"].to_list() == [8, 8, None, None]
    assert found.join_statuses == {"joined": 1, "duplicate": 0, "early": 0, "late": 1, "unmatched": 0}


@pytest.mark.parametrize(("take", "expected"), [("first", 2), ("last", 3)])
def test_of_outcomes_in_one_second_the_one_first_read_is_the_first(take, expected):
    outcome = Outcome(files="o", key="key", time="at", columns={"n": "int"}, take=take)
    found = joined(outcome, [("a", 0)], [("a", 9, 7), ("a", 5, 2), ("a", 5, 1), ("a", 9, 3)])
    assert found.columns["o_n"].to_list() == [expected]


@pytest.mark.parametrize(("duplicates", "total", "dropped"), [("drop", 5, 1), ("keep", 8, 0)])
def test_only_rows_that_are_equal_in_every_column_that_is_read_are_duplicates(duplicates, total, dropped):
    outcome = Outcome(files="o", key="key", time="at", columns={"n": "int"}, take="sum", duplicates=duplicates)
    found = joined(outcome, [("a", 0)], [("a", 1, 3), ("a", 2, 2), ("a", 1, 3)])
    assert found.columns["o_n"].to_list() == [total]
    assert found.join_statuses["duplicate"] == dropped


def test_impressions_and_outcomes_in_any_order_give_sums_of_their_own():
    """As many keys as impressions, in another order on either side: no impression may see a neighbour's."""
    count = 2_000
    shown = [(str(i * 7919 % count), 0) for i in range(count)]
    happened = [(str(i * 104729 % count), i % 13, i) for i in range(count) if i % 3]
    outcome = Outcome(files="o", key="key", time="at", columns={"n": "int"}, take="sum", window=6)
    value = {key: n for key, at, n in happened if at <= 6}
    found = joined(outcome, shown, happened)
    assert found.columns["o_n"].to_list() == [value.get(key) for key, _ in shown]
