"""Rows as ids and numbers: what the tables and the dense program of a package take."""

# Shapes: B rows, F features of one id, V ids of all lists of a feature, D dense columns.

from collections.abc import Sequence
from dataclasses import dataclass
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
            length_b = length_B[first:last]
            lists[name] = Lists(id_V[start : start + int(length_b.sum())], length_b)
        return Encoded(self.id_BF[first:last], lists, self.dense_BD[first:last])


def encoded(columns: pa.Table, schema: Schema) -> Encoded:
    """Rows of a dataset, or of `Encoders.encode`; of their columns only those of features are read."""
    rows = columns.num_rows
    ids = [columns[name].to_numpy().astype(np.int64, copy=False) for name in schema.single]
    lists = {}
    for name in schema.lists:
        column = columns[name].combine_chunks()
        length_B = np.diff(np.asarray(column.offsets)).astype(np.int64)
        lists[name] = Lists(_tensor(column.flatten().to_numpy().astype(np.int64, copy=False)), _tensor(length_B))
    numbers = [part for name in schema.dense_ranges for part in schema.features[name].decode(name, columns)]
    return Encoded(
        id_BF=_tensor(np.column_stack(ids) if ids else np.zeros((rows, 0), np.int64)),
        lists=lists,
        dense_BD=_tensor(np.column_stack(numbers) if numbers else np.zeros((rows, 0), np.float32)),
    )


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
