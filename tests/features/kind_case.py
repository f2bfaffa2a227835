"""What a test of a feature kind gives test_kinds: a column, and in plain Python what becomes of it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A feature `x` and the cells of its column.

    Attributes:
        settings: of the feature. tables: of the schema.
        cells: texts, or lists of texts; None is missing.
        bad: the reason of each row that is a dead letter.
        missing: of the other rows, how many have no value.
        dense: of the other rows, the columns of dense_BD; for a kind of numbers.
        ids: of the other rows, the ids; for a kind of ids.
    """

    settings: dict[str, Any]
    cells: list[str | list[str] | None]
    bad: dict[int, str] = field(default_factory=dict)
    missing: int = 0
    dense: list[list[float]] | None = None
    ids: list[list[int]] | None = None
    tables: dict[str, Any] = field(default_factory=dict)


def ids_by_frequency(lists: list[list[str]]) -> dict[str, int]:
    """Ids of a vocabulary: the most frequent value first, ties by value, after those of missing and unknown values."""
    counts = Counter(item for row in lists for item in row)
    return {value: 2 + rank for rank, value in enumerate(sorted(counts, key=lambda value: (-counts[value], value)))}
