"""Rows as ids and numbers: what the tables and the dense program of a package take."""

# Shapes: B rows, F features of one id, R lists of a feature, V ids of all of them, D dense columns, K of them of one feature.

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
        id_V: int64, list after list. length_R: int64, ids of each list.
        rows_R: int64, how many rows, one after the other, share each list, as candidates do a user's; None: each has its own.
    """

    id_V: Tensor
    length_R: Tensor
    rows_R: Tensor | None = None

    def of_rows(self, x_RX: Tensor) -> Tensor:
        """x_BX: what each list is, or has, for each row."""
        return x_RX if self.rows_R is None else x_RX.repeat_interleave(self.rows_R, 0)

    def slice(self, first: int, last: int) -> "Lists":
        """Of rows `first` to `last`, the latter exclusive."""
        rows_R = self.rows_R
        if rows_R is not None:
            end_R = rows_R.cumsum(0)
            rows_R = (end_R.clamp(max=last) - (end_R - rows_R).clamp(min=first)).clamp(min=0)
            used = rows_R.nonzero().ravel().tolist()
            first, last = (used[0], used[-1] + 1) if used else (0, 0)
            rows_R = rows_R[first:last]
        start = int(self.length_R[:first].sum())
        stop = start + int(self.length_R[first:last].sum())
        return Lists(self.id_V[start:stop], self.length_R[first:last], rows_R)


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
        lists = {name: own.slice(first, last) for name, own in self.lists.items()}
        return Encoded(self.id_BF[first:last], lists, self.dense_BD[first:last])


@dataclass
class Parts:
    """Encoded features of B rows by name, in any order: what `Encoded` is put together of.

    Attributes:
        id_B: int64. lists: int64 id_V and length_R, of a list a row. numbers: float32 of shape (B,) or (B, K), as
            `Feature.decode` has them. shared: as lists, of one that all rows have.
    """

    id_B: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    numbers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    shared: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

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
                length_R = np.diff(np.asarray(column.offsets)).astype(np.int64)
                found.lists[name] = (column.flatten().to_numpy().astype(np.int64, copy=False), length_R)
            else:
                found.numbers[name] = feature.decode(name, columns)
        return found

    def repeated(self, rows: int) -> "Parts":
        """One row as many."""
        return Parts(
            {name: id_B.repeat(rows) for name, id_B in self.id_B.items()},
            {},
            {name: [x.repeat(rows, 0) for x in found] for name, found in self.numbers.items()},
            self.lists,
        )

    def add(self, other: "Parts") -> None:
        """Takes the features of another one, of the same rows."""
        self.id_B |= other.id_B
        self.lists |= other.lists
        self.numbers |= other.numbers
        self.shared |= other.shared

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
        lists = {}
        for name in schema.lists:
            own = self.lists.get(name)
            id_V, length_R = map(_tensor, own or self.shared[name])
            lists[name] = Lists(id_V, length_R, None if own else torch.tensor([rows]))
        return Encoded(torch.from_numpy(id_BF), lists, torch.from_numpy(dense_BD))


def encoded(columns: pa.Table, schema: Schema) -> Encoded:
    """Rows of a dataset, or of `Encoders.encode`; of their columns only those of features are read."""
    return Parts.of(columns, schema, schema.features).encoded(schema, columns.num_rows)


def concatenated(parts: Sequence[Encoded]) -> Encoded:
    """The rows of several, one after the other; of at least one."""
    if len(parts) == 1:
        return parts[0]
    lists = {name: _concatenated([part.lists[name] for part in parts]) for name in parts[0].lists}
    return Encoded(torch.cat([part.id_BF for part in parts]), lists, torch.cat([part.dense_BD for part in parts]))


def _concatenated(parts: Sequence[Lists]) -> Lists:
    rows = [torch.ones_like(own.length_R) if own.rows_R is None else own.rows_R for own in parts]
    shared = any(own.rows_R is not None for own in parts)
    id_V, length_R = (torch.cat([own[place] for own in parts]) for place in (0, 1))  # type: ignore[misc]
    return Lists(id_V, length_R, torch.cat(rows) if shared else None)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())
