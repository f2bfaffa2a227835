"""The rows of tables that a split needs, and batches' ids as places among them."""

# Shapes: V ids of a column or of a batch, N needed rows of all tables, T tables, F features, K features of a batch.

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from features.errors import UserError, one_line
from features.fit.encoders import MISSING
from features.schema.schema import Schema, Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.shards import check_ids, open_shard, table_sizes

MERGE = 1 << 20  # ids of a table that are kept before they are merged into its distinct ones
DIRECT_ROWS = 1 << 26  # rows of all tables up to which a place is looked up in an array of 4 bytes each


class _Distinct:
    """The distinct ids of a table, in memory of the order of their number."""

    def __init__(self) -> None:
        self.found_N = np.array([MISSING], np.int64)  # so that no table is empty
        self.pending: list[np.ndarray] = []
        self.waiting = 0

    def add(self, id_V: pa.Array) -> None:
        """Adds the ids of a row group."""
        self.pending.append(pc.unique(id_V).to_numpy(zero_copy_only=False).astype(np.int64, copy=False))
        self.waiting += len(self.pending[-1])
        if self.waiting > max(MERGE, len(self.found_N)):
            self.sorted()

    def sorted(self) -> np.ndarray:
        """All of them, ascending."""
        self.found_N = np.unique(np.concatenate([self.found_N, *self.pending]))
        self.pending, self.waiting = [], 0
        return self.found_N


def needed_rows(dataset: Dataset, splits: Sequence[Split], part: int = 0, parts: int = 1) -> dict[str, np.ndarray]:
    """Of each table the rows that some splits look up, ascending int64, and row MISSING; read from the columns of ids alone.

    Managed tables are left out: which rows their ids have is known to each checkpoint's map of ids.

    Args:
        part, parts: of the splits' shards only each `parts`-th, from `part` on: ranks share the work.
    Raises:
        UserError: a shard that cannot be read, or an id outside of its table.
    """
    schema, sizes = dataset.schema, table_sizes(dataset)
    features = {name: schema.table_of(name) for name in schema.sparse if sizes[name] is not None}
    found = {table: _Distinct() for table in features.values()}
    shards = [shard for split in splits for shard in dataset.shards(split)] if features else []
    for shard in shards[part::parts]:
        try:
            _add_shard(dataset, shard, features, sizes, found)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{dataset.path / shard.path}: cannot be read ({one_line(error)}): the file changed after it was written. "
                "Restore it, or run jobs.preprocess again."
            ) from None
    return {table: distinct.sorted() for table, distinct in found.items()}


def _add_shard(
    dataset: Dataset,
    shard: Shard,
    features: Mapping[str, str],
    sizes: Mapping[str, int | None],
    found: Mapping[str, _Distinct],
) -> None:
    file = open_shard(dataset, shard, [*features])
    for group in range(len(shard.row_groups)):
        rows = file.read_row_group(group, [*features], use_threads=False)
        for name, table in features.items():
            column = rows[name].combine_chunks()
            check_ids(dataset.path / shard.path, name, column, sizes[name])
            found[table].add(column.flatten() if pa.types.is_list(column.type) else column)


def union(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The needed rows of all ranks' parts of a split."""
    return {table: np.unique(np.concatenate([part[table] for part in parts])) for table in parts[0]}


class CompactIds:
    """Replaces ids of a batch by their places among the needed rows of their tables; those of other tables stay.

    The tables are numbered through, one after the other, so that one lookup serves all features.

    Args:
        schema: of the batches. needed: of some tables the needed rows, ascending. rows: of all tables, by name.
        device: of the batches.
    Call Args:
        sparse: all features of a batch, in the schema's order, id_V.
    Raises:
        UserError: an id that is not among the needed ones: the split is another than the one they were read from.
    """

    def __init__(
        self, schema: Schema, needed: Mapping[str, np.ndarray], rows: Mapping[str, int], device: torch.device
    ) -> None:
        names = list(needed)
        size_T = np.array([rows[name] for name in names], np.int64)
        offset_T = np.cumsum(size_T) - size_T
        count_T = np.array([len(needed[name]) for name in names], np.int64)
        start_T = np.cumsum(count_T) - count_T
        number_N = np.concatenate(
            [needed[name] + offset for name, offset in zip(names, offset_T, strict=True)] or [np.zeros(0, np.int64)]
        )
        table_F = [names.index(t) if (t := schema.table_of(name)) in needed else -1 for name in schema.sparse]
        self.place_R: Tensor | None = None
        self.number_N = torch.from_numpy(number_N).to(device)
        if (total := int(size_T.sum())) <= DIRECT_ROWS:
            place_R = np.full(total, -1, np.int32)
            place_R[number_N] = np.arange(len(number_N), dtype=np.int32)
            self.place_R = torch.from_numpy(place_R).to(device)
        self.compact_F = torch.tensor([table >= 0 for table in table_F], device=device)
        self.offset_F = torch.tensor([int(offset_T[table]) if table >= 0 else 0 for table in table_F], device=device)
        self.start_F = torch.tensor([int(start_T[table]) if table >= 0 else 0 for table in table_F], device=device)

    def __call__(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same features with places for ids."""
        id_V = sparse.values()
        if not len(self.number_N) or not len(id_V):
            return sparse
        length_F = torch.tensor(sparse.length_per_key(), device=id_V.device)
        compact_V, offset_V, start_V = (
            x_F.repeat_interleave(length_F) for x_F in (self.compact_F, self.offset_F, self.start_F)
        )
        number_V = torch.where(compact_V, id_V + offset_V, self.number_N[0])
        place_V, known_V = self._places(number_V)
        if not bool(known_V.all()):
            raise UserError(
                "tables=needed: a batch has an id that the split did not have when its ids were collected: its files changed. "
                "Restore them, or evaluate with tables=all."
            )
        new_V = torch.where(compact_V, place_V - start_V, id_V)
        return KeyedJaggedTensor(
            sparse.keys(),
            new_V,
            lengths=sparse.lengths(),
            stride=sparse.stride(),
            length_per_key=sparse.length_per_key(),
            offset_per_key=sparse.offset_per_key(),
        )

    def _places(self, number_V: Tensor) -> tuple[Tensor, Tensor]:
        """Places among all needed rows, and whether each is there."""
        if self.place_R is not None:
            place_V = self.place_R[number_V].long()
            return place_V, place_V >= 0
        place_V = torch.searchsorted(self.number_N, number_V).clamp_(max=len(self.number_N) - 1)
        return place_V, self.number_N[place_V] == number_V
