"""Counters: sums and means over the earlier events of a key, at each impression, without a loop over rows.

An event is part of a counter at t if it was known before t; with a window, if it was known since t - window. With decay its
weight at t is 2^(-(t - known) / half-life).

Sums are float64, within a key, in the order in which its events became known. Those of whole numbers below 2^53 are exact but
for decay; else the error is at most n * eps * (the sum of absolute values), n being the events of the key until then, and with
decay about 1e-12 of that sum. A window is the end of one
span of its length and the beginning of the next: its sum is no difference of two larger ones.
"""

# Shapes: I impressions, E events, S events sorted by key and time.

import numpy as np
import polars as pl

from features.join.places import Places, key_codes
from features.source import Counter

SPAN = 512  # half-lives in which powers of two are added up: 2^512 times any number of float32 fits into float64
FIRST = np.iinfo(np.int64).min
EVENT = {"key": pl.String, "known": pl.Int64, "value": pl.Float64, "weight": pl.Float64}


def counted(
    counter: Counter, key_I: np.ndarray, time_I: np.ndarray, events: pl.DataFrame, key_E: np.ndarray, mean: float | None
) -> np.ndarray:
    """The counter's value at each impression, NaN where it has none: a missing key, or a mean of nothing.

    Args:
        key_I, key_E: numbers of keys, from 1; 0 for a missing one.
        time_I: seconds.
        events: E events, columns known (seconds), value (1 of a count) and weight (how many rows it stands for); all numbers
            are finite in float32.
        mean: towards which a mean is smoothed, None without smoothing.
    Returns: float64 of shape (I,).
    """
    known_E = events["known"].to_numpy()
    places = Places(key_E, known_E)
    key_S, known_S = key_E[places.order_E], known_E[places.order_E]
    first_I, stop_I = places.first(key_I), places.of(key_I, time_I)
    totals = {}
    for column in ("value", "weight") if counter.take == "mean" else ("value",):
        x_S = events[column].to_numpy()[places.order_E]
        if counter.window is None:
            totals[column] = _before(_running(key_S, known_S, x_S, counter.decay), first_I, stop_I)
        else:
            start_I = places.of(key_I, np.maximum(time_I, FIRST + counter.window) - counter.window)
            totals[column] = _in_window(key_S, known_S, x_S, start_I, stop_I, time_I // counter.window, counter.window)
    if counter.decay is not None and (counter.take != "mean" or counter.smoothing is not None):
        # From the last event to the impression. A mean that is not smoothed does without: both sums shrink alike.
        last_I = np.append(known_S, 0)[np.where(stop_I > first_I, stop_I - 1, len(known_S))]
        fading_I = np.exp2(-_distance(last_I, np.maximum(time_I, last_I)) / counter.decay)
        totals = {column: total_I * fading_I for column, total_I in totals.items()}
    return np.where(key_I > 0, _taken(counter, totals, mean), np.nan)


def _taken(counter: Counter, totals: dict[str, np.ndarray], mean: float | None) -> np.ndarray:
    value_I, weight_I = totals["value"], totals.get("weight")
    if weight_I is None:  # of a count or sum
        return value_I
    if counter.smoothing is not None:
        assert mean is not None
        return (value_I + counter.smoothing * mean) / (weight_I + counter.smoothing)
    return np.divide(value_I, weight_I, out=np.full(len(value_I), np.nan), where=weight_I > 0)


def kept(counter: Counter, events: pl.DataFrame, horizon: int) -> pl.DataFrame:
    """The events that impressions from `horizon` on can need: with them in place of all, their values are the same.

    With a window that is one event for each key and second since horizon - window; else one for each key, which stands for all
    that were known before the horizon, and each later one.

    Args:
        events: the columns of EVENT, all with a key and known.
        horizon: seconds.
    """
    if counter.window is not None:
        since = max(horizon - counter.window, int(FIRST))
        return (
            events.filter(pl.col("known") >= since)
            .group_by("key", "known", maintain_order=True)
            .agg(pl.col("value").sum(), pl.col("weight").sum())
        )
    past, later = events.filter(pl.col("known") < horizon), events.filter(pl.col("known") >= horizon)
    key_E, known_E = key_codes(past["key"]), past["known"].to_numpy()
    order_S = Places(key_E, known_E).order_E
    key_S, known_S = key_E[order_S], known_E[order_S]
    last_S = np.flatnonzero(np.append(key_S[1:] != key_S[:-1], np.full(min(len(key_S), 1), True)))
    sums = {
        column: _running(key_S, known_S, past[column].to_numpy()[order_S], counter.decay)[last_S]
        for column in ("value", "weight")
    }
    ends = past.select("key", "known")[order_S[last_S]].with_columns(pl.Series(name, x) for name, x in sums.items())
    return pl.concat([ends, later.select(ends.columns)])


def _before(sum_S: np.ndarray, first_I: np.ndarray, stop_I: np.ndarray) -> np.ndarray:
    """The running sum of a key before a place; 0 before its first event."""
    return np.append(sum_S, 0.0)[np.where(stop_I > first_I, stop_I - 1, len(sum_S))]


def _in_window(
    key_S: np.ndarray,
    known_S: np.ndarray,
    x_S: np.ndarray,
    start_I: np.ndarray,
    stop_I: np.ndarray,
    span_I: np.ndarray,
    window: int,
) -> np.ndarray:
    """The sum of the events at places start .. stop - 1, all of one key and known within a window before the impression.

    Args:
        span_I: the impressions' times in whole windows.
    """
    if not len(x_S):
        return np.zeros(len(start_I))
    span_S = known_S // window
    segment_S = np.cumsum(np.append(True, (key_S[1:] != key_S[:-1]) | (span_S[1:] != span_S[:-1])))
    from_begin_S = _added_up(segment_S, x_S)
    to_end_S = _added_up(segment_S[-1] - segment_S[::-1], x_S[::-1])[::-1]
    some_I, first_I, last_I = start_I < stop_I, np.minimum(start_I, len(x_S) - 1), np.maximum(stop_I - 1, 0)
    before_I = np.where(some_I & (span_S[first_I] < span_I), to_end_S[first_I], 0.0)
    return before_I + np.where(some_I & (span_S[last_I] == span_I), from_begin_S[last_I], 0.0)


def _running(key_S: np.ndarray, known_S: np.ndarray, x_S: np.ndarray, half_life: int | None) -> np.ndarray:
    """Per event the sum of its key's numbers up to it, with decay as of its own time.

    With decay: within a span of a key's time numbers are multiplied by 2^(half-lives since the span began), so that nothing
    underflows, and added up. Of earlier spans the one just before counts too; those before it would have weights below 2^-512.
    """
    if half_life is None:
        return _added_up(key_S, x_S)
    new_S = np.append(np.full(min(len(key_S), 1), True), key_S[1:] != key_S[:-1])
    first_S = known_S[np.flatnonzero(new_S)][np.cumsum(new_S) - 1]
    age_S = _distance(first_S, known_S)
    span_S = np.floor(age_S / (SPAN * half_life))
    begins_S = new_S | np.append(np.full(min(len(key_S), 1), True), span_S[1:] != span_S[:-1])
    segment_S = np.cumsum(begins_S) - 1
    x_half_lives_S = age_S / half_life - span_S * SPAN
    grown_S = _added_up(segment_S, x_S * np.exp2(x_half_lives_S))
    ends = np.append(np.flatnonzero(begins_S)[1:] - 1, len(key_S) - 1) if len(key_S) else np.empty(0, np.int64)
    before_S = ends[segment_S - 1]  # the last event of the segment before; of the first segment any
    follows_S = (segment_S > 0) & (key_S[before_S] == key_S) & (span_S[before_S] == span_S - 1)
    carried_S = np.where(follows_S, grown_S[before_S] * 2.0**-SPAN, 0.0)
    return (grown_S + carried_S) * np.exp2(-x_half_lives_S)


def _added_up(segment_S: np.ndarray, x_S: np.ndarray) -> np.ndarray:
    """Running sums within segments: not differences of sums over all, in which large numbers of one key spoil another's."""
    frame = pl.DataFrame({"segment": pl.Series(segment_S).set_sorted(), "x": x_S})
    return frame.select(pl.col("x").cum_sum().over("segment"))["x"].to_numpy()


def _distance(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """Seconds from one to another as float64, also where they are as far apart as 64 bits let them."""
    return (later.astype(np.uint64) - earlier.astype(np.uint64)).astype(np.float64)
