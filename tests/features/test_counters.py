"""Counters against a loop over impressions and events, and what a later job needs of them."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.join.counters import EVENT, counted, kept
from features.source import Counter

MEAN = 0.3  # towards which means are smoothed
Rows = list[tuple[int, int]]  # key (0: missing), time
Events = list[tuple[int, int, float]]  # key, known, value


@st.composite
def counters(draw: st.DrawFn) -> Counter:
    take = draw(st.sampled_from(["count", "sum", "mean"]))
    content: dict[str, Any] = {"by": "u", "take": take} | ({} if take == "count" else {"of": "x"})
    forgets = draw(st.sampled_from([None, "window", "decay"]))
    if forgets:
        content[forgets] = draw(st.integers(1, 12))
    if take == "mean" and draw(st.booleans()):
        content["smoothing"] = draw(st.sampled_from([0.5, 20.0]))
    return Counter(**content)


def times(spread: int) -> st.SearchStrategy[int]:
    return st.integers(-3, 15).map(lambda moment: moment * spread)


SPREAD = st.sampled_from([1, 7, 1500, 10**7])  # of times: with the last two most events are many half-lives apart
LOGS = SPREAD.flatmap(
    lambda spread: st.tuples(
        st.lists(st.tuples(st.integers(0, 3), times(spread)), max_size=12),
        st.lists(st.tuples(st.integers(1, 3), times(spread), st.floats(-100, 100, width=16)), max_size=25),
        times(spread),
    )
)


def frame(counter: Counter, events: Events) -> pl.DataFrame:
    rows = [(str(key), known, 1.0 if counter.take == "count" else value, 1.0) for key, known, value in events]
    return pl.DataFrame(rows, EVENT, orient="row")


def values(counter: Counter, rows: Rows, events: pl.DataFrame) -> list[float]:
    key_I, time_I = (np.array([row[place] for row in rows], np.int64) for place in (0, 1))
    key_E = events["key"].cast(pl.Int64).to_numpy()
    return counted(counter, key_I, time_I, events, key_E, MEAN).tolist()


def plain_value(counter: Counter, key: int, time: int, events: Events) -> float:
    found = [(known, value) for who, known, value in events if who == key and known < time]
    if counter.window:
        found = [(known, value) for known, value in found if known >= time - counter.window]
    if key == 0 or (not found and counter.take == "mean" and not counter.smoothing):
        return math.nan
    # Relative to the latest, so that a mean of what is long ago is still one.
    latest = max((known for known, _ in found), default=time)
    half_lives = [(latest - known) / counter.decay if counter.decay else 0.0 for known, _ in found]
    fading = 2.0 ** -((time - latest) / counter.decay) if counter.decay else 1.0
    weight = math.fsum(2.0**-age for age in half_lives)
    total = math.fsum(
        2.0**-age * (1 if counter.take == "count" else x) for age, (_, x) in zip(half_lives, found, strict=True)
    )
    if counter.take != "mean":
        return total * fading
    if not counter.smoothing:
        return total / weight
    return (total * fading + counter.smoothing * MEAN) / (weight * fading + counter.smoothing)


@settings(max_examples=examples(300), deadline=None)
@given(counters(), LOGS)
def test_each_value_is_that_of_a_loop_over_the_events_of_its_key(counter, log):
    rows, events, _ = log
    found, expected = (
        values(counter, rows, frame(counter, events)),
        [plain_value(counter, *row, events) for row in rows],
    )
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-11, nan_ok=True)


@settings(max_examples=examples(200), deadline=None)
@given(counters(), LOGS, st.integers(0, 15))
def test_what_is_kept_at_a_horizon_stands_for_all_before_it(counter, log, split):
    """Also in two steps: a day's state holds that of the day before, and events that become known on later days."""
    rows, events, horizon = log
    rows = [(key, max(time, horizon)) for key, time in rows]
    first = kept(counter, frame(counter, events[:split]), horizon)
    second = kept(counter, pl.concat([first, frame(counter, events[split:])]), horizon)
    whole = values(counter, rows, frame(counter, events))
    assert values(counter, rows, second) == pytest.approx(whole, rel=1e-9, abs=1e-11, nan_ok=True)
    assert second.schema == pl.Schema(EVENT)


@settings(max_examples=examples(100), deadline=None)
@given(counters(), LOGS)
def test_what_is_kept_is_no_more_than_is_needed(counter, log):
    _, events, horizon = log
    found = kept(counter, frame(counter, events), horizon)
    pending, keys = sum(known >= horizon for _, known, _ in events), len({key for key, _, _ in events})
    if counter.window:
        assert found["known"].min() is None or found["known"].min() >= horizon - counter.window
        assert found.height == found.unique(["key", "known"]).height
    else:
        assert found.height <= keys + pending


def test_an_event_counts_from_the_second_after_it_was_known_to_the_last_of_the_window():
    counter = Counter(by="u", take="count", window=5)
    events = frame(counter, [(1, 100, 0.0)])
    assert values(counter, [(1, time) for time in (99, 100, 101, 105, 106)], events) == [0, 0, 1, 1, 0]


def test_a_half_life_halves():
    counter = Counter(by="u", take="sum", of="x", decay=10)
    events = frame(counter, [(1, 0, 8.0), (1, 10, 2.0), (2, 0, 1.0)])
    assert values(counter, [(1, 10), (1, 20), (1, 30), (2, 40)], events) == [4, 3, 1.5, 1 / 16]


def test_sums_of_whole_numbers_are_exact_whatever_other_keys_hold():
    counter = Counter(by="u", take="sum", of="x", window=3)
    events = frame(counter, [(1, moment, 3e38) for moment in range(50)] + [(2, moment, 1.0) for moment in range(50)])
    assert values(counter, [(2, 20), (2, 50), (2, 60)], events) == [3, 3, 0]
    assert values(counter, [(1, 60)], events) == [0]


def test_a_large_number_that_has_left_the_window_leaves_nothing_behind_also_from_a_state():
    counter = Counter(by="u", take="sum", of="x", window=7)
    events = frame(counter, [(1, 0, 3e38), (1, 9, 1.0), (1, 15, 5.0), (1, 17, 3.0), (1, 30, -3e38)])
    rows = [(1, moment) for moment in (8, 10, 16, 18, 22, 23, 24, 25)]
    expected = [0, 1, 6, 8, 8, 3, 3, 0]
    assert values(counter, rows, events) == expected
    horizon = 16
    assert values(counter, rows[2:], kept(counter, events, horizon)) == expected[2:]


def test_a_mean_with_decay_of_long_ago_is_still_that_mean_and_a_smoothed_one_the_trains():
    events = [(1, 0, 1.0), (1, 1, 0.0)]
    plain = Counter(by="u", take="mean", of="x", decay=1)
    assert values(plain, [(1, 10**9)], frame(plain, events)) == [pytest.approx(1 / 3)]
    smoothed = plain.model_copy(update={"smoothing": 2.0})
    assert values(smoothed, [(1, 10**9), (2, 5)], frame(smoothed, events)) == [MEAN, MEAN]


@pytest.mark.parametrize("forgets", [{"window": 10}, {"decay": 10}, {}])
def test_times_may_be_as_far_apart_as_64_bits_let_them(forgets):
    counter = Counter(by="u", take="count", **forgets)
    never, far = np.iinfo(np.int64).min, 2**62
    events = frame(counter, [(1, -far, 0.0), (1, far - 1, 0.0)])
    expected = {"window": [0, 0, 1], "decay": [0, 0, 2**-0.1]}.get(next(iter(forgets), ""), [0, 0, 2])
    assert values(counter, [(1, never), (1, -far), (1, far)], events) == pytest.approx(expected)


@pytest.mark.parametrize("half_life", [1, 60, 10_000])
def test_a_long_log_with_decay_loses_no_precision(half_life):
    rng = np.random.default_rng(0)
    known = np.sort(rng.integers(0, 10**6, 5000))
    x = rng.normal(size=5000)
    counter = Counter(by="u", take="sum", of="x", decay=half_life)
    events = frame(counter, [(1, int(moment), float(value)) for moment, value in zip(known, x, strict=True)])
    expected, total, last = [], 0.0, 0
    for moment, value in zip(known.tolist(), x.tolist(), strict=True):
        expected.append(total * 2.0 ** -((moment - last) / half_life) if moment > last else None)
        total, last = total * 2.0 ** -((moment - last) / half_life) + value, moment
    found = values(counter, [(1, int(moment)) for moment in known], events)
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-9, abs=1e-10)


def test_without_events_or_rows_there_is_nothing_to_add_up():
    counter = Counter(by="u", take="mean", of="x", decay=3)
    assert values(counter, [], frame(counter, [])) == []
    assert np.isnan(values(counter, [(1, 5)], frame(counter, []))).all()
    assert kept(counter, frame(counter, []), 0).height == 0
