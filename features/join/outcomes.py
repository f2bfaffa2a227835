"""Which outcomes belong to which impressions: a join by key within a window of time, without a loop over rows."""

# Shapes: I impressions, O outcomes, D outcomes without duplicates.

from dataclasses import dataclass

import numpy as np
import polars as pl

from features.join.places import Places
from features.source import Outcome

JOIN_STATUSES = ("joined", "duplicate", "early", "late", "unmatched")


@dataclass(frozen=True)
class Joined:
    """Result of `join`.

    Attributes:
        columns: [I] NAME, NAME_count, NAME_time where there is one, and NAME_COLUMN of the outcome's columns.
        join_statuses: how many outcomes have each of JOIN_STATUSES; together all O.
        latest: time of the last one that was joined.
    """

    columns: pl.DataFrame
    join_statuses: dict[str, int]
    latest: int | None


def join(name: str, outcome: Outcome, impressions: pl.DataFrame, events: pl.DataFrame) -> Joined:
    """Joins outcomes to impressions.

    An outcome is joined where an impression with its key took place at most a window before it (in the same second counts, and
    so does the window's last), and then to every such impression. It is early where all impressions of its key are later,
    unmatched where there are none, and late otherwise. Of outcomes in the same second the one first read is the first.

    Args:
        impressions: columns key, and time where outcomes have one (where either is missing there is no outcome).
        events: the outcome's key column, its time column and its other columns, in the order they were read; all have a key
            and a time.
    """
    unique = events
    if outcome.duplicates == "drop":
        unique = events.unique(maintain_order=True, keep="first")
    key_I, key_D = _codes(impressions["key"], unique[outcome.key])
    valid_I = impressions["key"].is_not_null().to_numpy()
    if outcome.time:
        time_I, time_D = impressions["time"].fill_null(0).to_numpy(), unique[outcome.time].to_numpy()
        valid_I = valid_I & impressions["time"].is_not_null().to_numpy()
    else:
        time_I, time_D = np.zeros(len(key_I), np.int64), np.zeros(len(key_D), np.int64)
    place = Places(key_D, time_D)
    order_D = place.order_E
    start_I = place.of(key_I, time_I, "left")
    closes = outcome.window is not None and outcome.late == "drop"
    stop_I = place.of(key_I, time_I + (outcome.window or 0), "right") if closes else place.first(key_I + 1)
    stop_I = np.where(valid_I, stop_I, start_I)
    count_I = stop_I - start_I
    columns: dict[str, pl.Series] = {
        name: pl.Series(count_I > 0), f"{name}_count": pl.Series(count_I),
    }  # fmt: skip
    for column in outcome.types:
        label = "time" if column == outcome.time else column
        take = "first" if label == "time" and outcome.take not in ("first", "last") else outcome.take
        columns[f"{name}_{label}"] = _taken(unique[column].gather(pl.Series(order_D)), start_I, stop_I, take)
    joined_D = _joined(start_I[valid_I], stop_I[valid_I], len(key_D))
    join_statuses = _join_statuses(key_I[valid_I], time_I[valid_I], key_D[order_D], time_D[order_D], joined_D)
    latest = int(time_D[order_D][joined_D].max()) if outcome.time and joined_D.any() else None
    return Joined(pl.DataFrame(columns), {**join_statuses, "duplicate": events.height - unique.height}, latest)


def _codes(left: pl.Series, right: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Keys of both sides as numbers from 0; a missing one as any."""
    both = pl.concat([left, right]).rank("dense").cast(pl.Int64).fill_null(1).to_numpy() - 1
    return both[: len(left)], both[len(left) :]


def _taken(values: pl.Series, start_I: np.ndarray, stop_I: np.ndarray, take: str) -> pl.Series:
    """Per impression one of the values start .. stop - 1, or their sum, minimum or maximum; null without one."""
    if take in ("first", "last"):
        place = pl.Series(start_I if take == "first" else stop_I - 1)
        return values.gather(place.set(pl.Series(stop_I == start_I), None))
    number_D = values.cast(pl.Float64).to_numpy()
    known_D = ~np.isnan(number_D)
    nothing = {"sum": 0.0, "min": np.inf, "max": -np.inf}[take]
    operation = {"sum": np.add, "min": np.minimum, "max": np.maximum}[take]
    # In the order of the events: reduceat also goes over what lies between an impression's stop and the next one's start.
    order_I = np.argsort(start_I, kind="stable")
    bounds = np.column_stack([start_I, stop_I])[order_I].ravel()
    found_I = np.empty(len(start_I))
    # One more value, so that a bound behind the last one is a place.
    found_I[order_I] = operation.reduceat(np.append(np.where(known_D, number_D, nothing), nothing), bounds)[::2]
    known_I = np.diff(np.concatenate([[0], np.cumsum(known_D)])[np.column_stack([start_I, stop_I])], axis=1).ravel() > 0
    result = pl.Series(np.where(known_I, found_I, np.nan)).fill_nan(None)
    return result.cast(values.dtype) if values.dtype.is_integer() else result


def _joined(start_I: np.ndarray, stop_I: np.ndarray, events: int) -> np.ndarray:
    """Which of the events, sorted by key and time, lie in one of the ranges."""
    covered = np.zeros(events + 1, np.int64)
    np.add.at(covered, start_I, 1)
    np.add.at(covered, stop_I, -1)
    return np.cumsum(covered)[:-1] > 0


def _join_statuses(
    key_I: np.ndarray, time_I: np.ndarray, key_D: np.ndarray, time_D: np.ndarray, joined_D: np.ndarray
) -> dict[str, int]:
    """How many events have each status; they are sorted by key and time."""
    known_D = np.isin(key_D, key_I)
    first_K = np.full(int(max(key_D.max(initial=-1), key_I.max(initial=-1))) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_K, key_I, time_I)
    early_D = known_D & (time_D < first_K[key_D]) & ~joined_D
    return {
        "joined": int(joined_D.sum()),
        "early": int(early_D.sum()),
        "late": int((known_D & ~early_D & ~joined_D).sum()),
        "unmatched": int((~known_D).sum()),
    }
