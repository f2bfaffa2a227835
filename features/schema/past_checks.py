"""Checks of histories and counters: what they read is known before they are made, and reveals nothing of the row itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from features.schema.expressions import column_of, columns_of

if TYPE_CHECKING:
    from features.schema.schema import Schema


def contradictions_of_the_past(schema: Schema) -> Iterator[str]:
    """What is wrong between histories or counters and other parts of the schema."""
    for name, history in schema.histories.items():
        if not schema.event_time:
            yield f"event_time is missing: the history of bag {name} is made of earlier rows"
        if history.when:
            yield from _untimed(schema, history.when, f"bag {name}: its history", f"bag {name}: history.when")
    for name, counter in schema.source.counters.items():
        key = f"source.counters.{name}"
        if not schema.event_time:
            yield f"event_time is missing: {key} is made of earlier rows"
        if name in schema.histories:
            yield f"{key} has the name of a bag with a history: rename one of the two"
        if later := sorted(schema.roots_of([counter.by]) & schema.outcome_columns.keys()):
            yield f"{key}.by reads {later[0]}, an outcome that is known only after the impression. Name another column."
        for part, text in counter.expressions.items():
            # A sum of outcomes that happened is not changed by those that did not.
            adds = part == "of" and counter.take == "sum"
            yield from _untimed(schema, text, key, f"{key}.{part}", absence=part == "of" and not adds)
    yield from _of_counters(schema)


def _untimed(schema: Schema, text: str, reader: str, key: str, absence: bool = False) -> Iterator[str]:
    """Outcomes that an expression reads without a time at which their value is known.

    Args:
        reader, key: how messages name what reads the outcome, and the expression.
        absence: whether that an outcome did not happen counts, even where the expression is its name.
    """
    for outcome in sorted(schema.outcomes_of(text)):
        stream = schema.source.outcomes[outcome]
        if not stream.time:
            yield f"{reader} reads outcome {outcome}, which has no time: give it one"
        elif (absence or column_of(text) != outcome) and (stream.window is None or stream.late == "keep"):
            yield (
                f"{key} reads more of outcome {outcome} than that it happened, which is known only "
                "once its window has closed: give the outcome a window (and late: drop)"
            )


def _of_counters(schema: Schema) -> Iterator[str]:
    """Columns of counters that are needed before there are any, and what counters and histories read of each other."""
    needed = {"source.key": schema.source.key, "source.row_id": schema.source.row_id, "event_time": schema.event_time}
    needed |= {"split.key": getattr(schema.split, "key", None)}
    read: dict[str, list[str]] = {key: [column] for key, column in needed.items() if column}
    for name, past in schema.past.items():
        key = f"bag.{name}.history" if name in schema.histories else f"source.counters.{name}"
        read[key] = past.columns + [column for text in past.expressions.values() for column in columns_of(text)]
    for key, columns in read.items():
        if found := sorted(schema.roots_of(columns) & schema.source.counters.keys()):
            yield f"{key} reads {found[0]}, which is a counter: it must read columns of the log"
