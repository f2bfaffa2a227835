"""Counts of a split's rows beside the train split's statistics: values that are missing or unknown, and sums of numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.fit.encoders import MISSING, Encoders
from features.kinds.values import float64

# Shapes: B rows, V values: a row's own, or those of all lists.


@dataclass(frozen=True)
class FeatureCounts:
    """Counts of one feature; those of parts of the rows add up.

    Attributes:
        rows, missing: rows, and those without a value (of a bag: with an empty list).
        values: ids or numbers that are there.
        unknown: of these, the ids outside the vocabulary; None without a vocabulary.
        total: sum of the numbers; None without numbers.
    """

    rows: int
    missing: int
    values: int = 0
    unknown: int | None = None
    total: float | None = None

    def __add__(self, other: "FeatureCounts") -> "FeatureCounts":
        return FeatureCounts(
            self.rows + other.rows,
            self.missing + other.missing,
            self.values + other.values,
            None if self.unknown is None or other.unknown is None else self.unknown + other.unknown,
            None if self.total is None or other.total is None else self.total + other.total,
        )


def count_features(encoders: Encoders, rows: pa.Table, encoded: pa.Table) -> dict[str, FeatureCounts]:
    """Counts rows of one split by feature.

    Args:
        rows: B parsed rows (see features.parse.raw.parse).
        encoded: the same rows as columns of a dataset.
    """
    found = {}
    for name in encoders.schema.features:
        values = rows[name]
        if pa.types.is_floating(values.type):
            x_B = float64(values.combine_chunks())
            present = x_B[~np.isnan(x_B)]
            found[name] = FeatureCounts(len(x_B), len(x_B) - len(present), len(present), total=float(present.sum()))
        elif name in encoders.schema.sparse:
            found[name] = _count_ids(encoders, name, encoded[name].combine_chunks())
        else:
            found[name] = FeatureCounts(rows.num_rows, values.null_count, rows.num_rows - values.null_count)
    return found


def _count_ids(encoders: Encoders, name: str, ids: pa.Array) -> FeatureCounts:
    """Counts the ids of a row, or of its list."""
    if pa.types.is_list(ids.type):
        missing = int(np.count_nonzero(pc.list_value_length(ids).to_numpy(zero_copy_only=False) == 0))
        id_V = ids.flatten().to_numpy()
        values = len(id_V)
    else:
        id_V = ids.to_numpy()
        missing = int(np.count_nonzero(id_V == MISSING))
        values = len(id_V) - missing
    unknown = encoders.unknown_ids(encoders.schema.table_of(name))
    if unknown is None:
        return FeatureCounts(len(ids), missing, values)
    unknown_V = (id_V >= unknown.start) & (id_V < unknown.stop)
    return FeatureCounts(len(ids), missing, values, int(np.count_nonzero(unknown_V)))


def summed(parts: Iterable[Mapping[str, FeatureCounts]]) -> dict[str, FeatureCounts]:
    """The counts of all parts together, by feature."""
    found: dict[str, FeatureCounts] = {}
    for part in parts:
        for name, counts in part.items():
            found[name] = found[name] + counts if name in found else counts
    return found
