"""Labels and weights of a block of rows: where a task is observed, and where an outcome is not known yet."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from features.parse import compute
from features.schema.schema import Schema
from features.schema.task import given_chain


def labels(schema: Schema, frame: pl.DataFrame, undecided: Sequence[tuple[str, np.ndarray]]) -> dict[str, pl.Series]:
    """The columns label.TASK, null where not observed; a task that others are given only where these are 1.

    Args:
        frame: B rows of the columns that expressions read.
        undecided: outcomes, each with [B] whether it may still happen or be in a file that is absent.
    Raises:
        UserError: an expression does not fit the columns.
    """
    own, found = {name: _label(schema, frame, name, undecided) for name in schema.tasks}, {}
    for name, label in own.items():
        for other in given_chain(schema.tasks, name):
            label = label.set((own[other] != 1).fill_null(True), None)
        found[f"label.{name}"] = label
    return found


def _label(schema: Schema, frame: pl.DataFrame, name: str, undecided: Sequence[tuple[str, np.ndarray]]) -> pl.Series:
    task = schema.tasks[name]
    label = compute.number(frame, f"tasks.{name}.label", task.label, f"label.{name}")
    reads = schema.outcomes_of(task.label)
    if task.observed_when is not None:
        observed = compute.truth(frame, f"tasks.{name}.observed_when", task.observed_when)
        label = label.set(~observed, None)
        reads |= schema.outcomes_of(task.observed_when)
    for outcome, undecided_B in undecided:
        if outcome in reads and schema.source.outcomes[outcome].open_window == "unobserved":
            label = label.set(pl.Series(undecided_B), None)
    return label


def weights(schema: Schema, frame: pl.DataFrame) -> pl.Series:
    """The weight of each of B rows, 1 where the schema has none. Raises UserError."""
    if schema.weight is None:
        return pl.Series([1.0], dtype=pl.Float32).new_from_index(0, frame.height)
    return compute.number(frame, "weight", schema.weight, "weight")
