"""Rows as ids and numbers: what the tables and the dense program of a package take."""

# Shapes: B rows, F features of one id, V ids of all lists of a feature, D dense columns, K of them of one feature.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.schema.schema import Schema


class Lists(NamedTuple):
    """The ids of a feature of lists.

    Attributes:
        id_V: int64, row after row. length_B: int64, ids of each row.
    """

    id_V: Tensor
    length_B: Tensor


@dataclass(frozen=True)
class Encoded:
    """B encoded rows.

    Attributes:
        id_BF: int64, of the features in the order of `Schema.single`.
        lists: of each feature of `Schema.lists`, in its order.
        dense_BD: float32, columns as `Schema.dense_ranges` has them.
    """

    id_BF: Tensor
    lists: dict[str, Lists]
    dense_BD: Tensor

    def __len__(self) -> int:
        return len(self.dense_BD)

    def slice(self, first: int, last: int) -> "Encoded":
        """Rows `first` to `last`, the latter exclusive."""
        lists = {}
        for name, (id_V, length_B) in self.lists.items():
            start = int(length_B[:first].sum())
            stop = start + int(length_B[first:last].sum())
            lists[name] = Lists(id_V[start:stop], length_B[first:last])
        return Encoded(self.id_BF[first:last], lists, self.dense_BD[first:last])


@dataclass
class Parts:
    """Encoded features of B rows by name, in any order: what `Encoded` is put together of.

    Attributes:
        id_B: int64. lists: int64 id_V and length_B. numbers: float32 of shape (B,) or (B, K), as `Feature.decode` has them.
    """

    id_B: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: pa.Table, schema: Schema, names: Iterable[str]) -> "Parts":
        """Features among the columns of a dataset's rows."""
        found = cls()
        for name in names:
            feature = schema.features[name]
            if feature.layout == "id":
                found.id_B[name] = columns[name].to_numpy().astype(np.int64, copy=False)
            elif feature.layout == "ids":
                column = columns[name].combine_chunks()
                length_B = np.diff(np.asarray(column.offsets)).astype(np.int64)
                found.lists[name] = (column.flatten().to_numpy().astype(np.int64, copy=False), length_B)
            else:
                found.numbers[name] = feature.decode(name, columns)
        return found

    def repeated(self, rows: int) -> "Parts":
        """One row as many."""
        return Parts(
            {name: id_B.repeat(rows) for name, id_B in self.id_B.items()},
            {name: (np.tile(id_V, rows), length_B.repeat(rows)) for name, (id_V, length_B) in self.lists.items()},
            {name: [x.repeat(rows, 0) for x in found] for name, found in self.numbers.items()},
        )

    def add(self, other: "Parts") -> None:
        """Takes the features of another one, of the same rows."""
        self.id_B |= other.id_B
        self.lists |= other.lists
        self.numbers |= other.numbers

    def encoded(self, schema: Schema, rows: int) -> Encoded:
        """All features of a schema, in its order."""
        id_BF, dense_BD = (
            np.empty((rows, len(schema.single)), np.int64),
            np.empty((rows, schema.dense_width), np.float32),
        )
        for f, name in enumerate(schema.single):
            id_BF[:, f] = self.id_B[name]
        for name, columns in schema.dense_ranges.items():
            start = columns.start
            for part in self.numbers[name]:
                part_BK = part[:, None] if part.ndim == 1 else part
                dense_BD[:, start : start + part_BK.shape[1]] = part_BK
                start += part_BK.shape[1]
        lists = {name: Lists(*map(_tensor, self.lists[name])) for name in schema.lists}
        return Encoded(torch.from_numpy(id_BF), lists, torch.from_numpy(dense_BD))


def encoded(columns: pa.Table, schema: Schema) -> Encoded:
    """Rows of a dataset, or of `Encoders.encode`; of their columns only those of features are read."""
    return Parts.of(columns, schema, schema.features).encoded(schema, columns.num_rows)


def concatenated(parts: Sequence[Encoded]) -> Encoded:
    """The rows of several, one after the other; of at least one."""
    if len(parts) == 1:
        return parts[0]
    lists = {
        name: Lists(*(torch.cat([part.lists[name][place] for part in parts]) for place in (0, 1)))
        for name in parts[0].lists
    }
    return Encoded(torch.cat([part.id_BF for part in parts]), lists, torch.cat([part.dense_BD for part in parts]))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())
