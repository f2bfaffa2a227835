"""What a user met before, against a loop over impressions and events."""

import numpy as np
import polars as pl
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.join.history import kept, recent

MOMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 4)), max_size=20)  # user, time


def lists_of(shown: list[tuple[int, int]], happened: list[tuple[int, int]], length: int) -> list[list[int]]:
    """The indices of the events in each impression's list."""
    user_I, time_I, user_E, time_E = (
        np.array([pair[place] for pair in pairs], np.int64) for pairs in (shown, happened) for place in (0, 1)
    )
    offsets, event_V = recent(user_I, time_I, user_E, time_E, length)
    assert (offsets.dtype, event_V.dtype) == (np.int64, np.int64)
    assert offsets[0] == 0
    assert offsets[-1] == len(event_V)
    return [event_V[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def plain_list(user: int, time: int, happened: list[tuple[int, int]], length: int) -> list[int]:
    before = [(at, index) for index, (who, at) in enumerate(happened) if who == user and at < time]
    return [index for _, index in sorted(before, reverse=True)][:length]


@settings(max_examples=examples(300), deadline=None)
@given(MOMENTS, MOMENTS, st.integers(1, 5))
def test_each_list_is_that_of_a_loop_over_the_events_of_its_user(shown, happened, length):
    assert lists_of(shown, happened, length) == [plain_list(*who, happened, length) for who in shown]


@settings(max_examples=examples(100), deadline=None)
@given(MOMENTS)
def test_an_impression_is_never_in_its_own_history_nor_are_those_of_its_second(shown):
    for (user, time), found in zip(shown, lists_of(shown, shown, 50), strict=True):
        assert all(shown[event][0] == user and shown[event][1] < time for event in found)


def test_a_list_begins_with_the_latest_and_ends_where_its_length_does():
    happened = [(1, 30), (1, 10), (1, 20), (2, 15), (1, 20)]
    assert lists_of([(1, 31)], happened, 9) == [[0, 4, 2, 1]]
    assert lists_of([(1, 31)], happened, 2) == [[0, 4]]


def test_the_second_of_the_impression_itself_is_not_before_it():
    assert lists_of([(0, 10), (0, 11)], [(0, 10)], 5) == [[], [0]]


def test_users_without_events_and_impressions_without_a_known_time_have_empty_lists():
    nobody, never = 99, np.iinfo(np.int64).min
    assert lists_of([(nobody, 100), (0, never), (0, 100)], [(0, 5)], 5) == [[], [], [0]]
    assert lists_of([(0, 5)], [], 5) == [[]]
    assert lists_of([], [(0, 5)], 5) == []


def test_times_may_be_as_far_apart_as_64_bits_let_them():
    """Numbers that stand for user and time together must not overflow."""
    far = 2**62
    assert lists_of([(10**6, far), (10**6, -far)], [(10**6, -far), (10**6, far - 1), (0, 0)], 5) == [[1, 0], []]


@settings(max_examples=examples(200), deadline=None)
@given(MOMENTS, MOMENTS, st.integers(0, 20), st.integers(-2, 4), st.integers(1, 4))
def test_what_is_kept_at_a_horizon_stands_for_all_before_it(shown, happened, split, horizon, length):
    """Also in two steps: a day's state holds that of the day before, and events that become known on later days."""
    shown = [(user, max(time, horizon)) for user, time in shown]
    rows = [(str(user), at, str(index)) for index, (user, at) in enumerate(happened)]
    events = pl.DataFrame(rows, {"key": pl.String, "known": pl.Int64, "item": pl.String}, orient="row")
    found = kept(pl.concat([kept(events[:split], horizon, length), events[split:]]), horizon, length)
    left = [(int(user), at) for user, at in found.select("key", "known").rows()]
    items = [[int(found["item"][event]) for event in events] for events in lists_of(shown, left, length)]
    assert items == lists_of(shown, happened, length)
    assert found.columns == events.columns
    assert found.filter(pl.col("known") < horizon).group_by("key").len()["len"].max() in (None, *range(length + 1))
