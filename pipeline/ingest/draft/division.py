"""The split of a draft: by time where the log has days, else by user, else by row."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from pipeline.ingest.draft.column import Column
from pipeline.ingest.draft.roles import DAY, Stream

USER = re.compile(
    r"^(user|member|customer|visitor|account|client|household|person|device|cookie|session|u)(_?(id|key|hash|uid))?$|^uid$"
)
FEWEST_KEYS = 100  # in a sample: of fewer a split may get none


@dataclass(frozen=True)
class Division:
    """Section `split` with the reason."""

    settings: dict[str, Any]
    why: str


def division_of(stream: Stream, event_time: Column | None, key: Column | None) -> Division:
    """How rows become train, valid and test."""
    days = _days(stream, event_time)
    if days is not None and len(days) >= 3:
        held_out = max(1, round(0.1 * len(days)))
        valid, test = days[-2 * held_out], days[-held_out]
        settings: dict[str, Any] = {"by": "time", "valid_from": f"{valid:%Y-%m-%d}", "test_from": f"{test:%Y-%m-%d}"}
        last = "the last day is" if held_out == 1 else f"the last {held_out} days are"
        return Division(settings, f"{len(days)} days from {days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}: {last} the test")
    no_days = (
        "no event_time"
        if event_time is None
        else "the end of the log was not read, and so not its last day"
        if days is None
        else "less than 3 days of event_time"
    )
    users = [c for c in stream.columns.values() if USER.search(c.word)]
    for column in [*users, *([key] if key else [])]:
        if column.kind in ("int", "text") and column.missing == 0 and column.distinct >= FEWEST_KEYS:
            what = "all rows of a user are in one split" if column in users else "by the key of the rows"
            return Division({"by": "hash", "key": column.name, "valid": 0.1, "test": 0.1}, f"{no_days}; {what}")
    settings = {"by": "row_index", "modulo": 10, "train": [*range(8)], "valid": [8], "test": [9]}
    return Division(settings, f"{no_days}, and no column of users: by the place of the row in its file")


def _days(stream: Stream, event_time: Column | None) -> list[datetime] | None:
    """The days (UTC) of the log without a last one of less than an hour; None where its end is not known."""
    if event_time is None or event_time.moments is None:
        return []
    seconds = event_time.moments.seconds.drop_nulls().to_numpy()
    first, last = int(seconds.min()), int(seconds.max())
    dated = stream.sample.group.days
    if dated:
        last = max(
            last, int(datetime(dated[-1].year, dated[-1].month, dated[-1].day, tzinfo=timezone.utc).timestamp()) + 3600
        )
    elif not stream.sample.to_its_end:
        return None
    start = datetime.fromtimestamp(first - first % DAY, timezone.utc)
    return [start + timedelta(days=i) for i in range((last - 3600 - (first - first % DAY)) // DAY + 1)]


def span_of(event_time: Column | None) -> int:
    """Seconds from the first to the last row of the sample."""
    if event_time is None or event_time.moments is None:
        return 0
    return int(np.ptp(event_time.moments.seconds.drop_nulls().to_numpy()))
