"""Tables for an unbounded id space (features.schema.kinds.Managed): ids are mapped to rows as they appear in training."""

# Shapes: V ids of a batch, N distinct ids in ascending order.

from typing import Protocol, cast

import torch
import torch.fx
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from features.fit.encoders import MISSING
from features.kinds.tables import Managed
from features.schema.schema import Schema
from models.id_map import IdMap

Ids = dict[str, tuple[Tensor, Tensor]]  # of each table distinct ids, ascending, and how often each was there


class Exchange(Protocol):
    """How ranks that share maps answer each other, for all tables at once; all ranks call its methods together."""

    def ask(self, ids: Ids, keep: bool) -> tuple[dict[str, Tensor], Ids]:
        """The rows of this rank's ids, and with `keep` the ids that this rank's parts of the maps were asked for."""

    def gather(self, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all ranks."""


class ManagedIds(nn.Module):
    """Replaces the ids of managed tables by rows.

    In training it keeps the ids of the last batch, and `admit` assigns rows to them after the step: a new id is first looked up
    in the row of unknown ids, which thereby learns what to expect of an unseen id.

    Args:
        schema: has managed tables. device: of the maps; "meta" leaves their allocation to the sharding.
    Attributes:
        exchange: between ranks that have a part of each map; None where this one has all of it.
    Call Args:
        sparse: all keys of a batch.
    Returns: the same, with rows for the ids of managed tables.
    """

    exchange: Exchange | None = None

    def __init__(self, schema: Schema, device: str = "cpu") -> None:
        super().__init__()
        managed = managed_tables(schema)
        self.features = {name: [f for f in schema.sparse if schema.table_of(f) == name] for name in managed}
        self.maps = nn.ModuleDict(
            {name: IdMap(settings, device=torch.device(device)) for name, settings in managed.items()}
        )
        self.seen: Ids = {}  # of the last batch in training, those that this rank's maps answer for

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        value_V = sparse.values().clone()
        of_feature = dict(zip(sparse.keys(), value_V.split(sparse.length_per_key()), strict=True))
        ids: Ids = {}
        places = {}
        for table, features in self.features.items():
            id_V = torch.cat([of_feature[name] for name in features])
            id_N, places[table], count_N = id_V.unique(return_inverse=True, return_counts=True)
            ids[table] = id_N, count_N
        for table, row_N in self._rows(ids).items():
            row_V = torch.where(ids[table][0] == MISSING, MISSING, row_N)[places[table]]
            parts = [of_feature[name] for name in self.features[table]]
            for part, row in zip(parts, row_V.split([len(part) for part in parts]), strict=True):
                part.copy_(row)
        return KeyedJaggedTensor(
            sparse.keys(),
            value_V,
            lengths=sparse.lengths(),
            stride=sparse.stride(),
            length_per_key=sparse.length_per_key(),
            offset_per_key=sparse.offset_per_key(),
        )

    def _rows(self, ids: Ids) -> dict[str, Tensor]:
        if self.exchange is None:
            rows, asked = {table: self._map(table).lookup(id_N) for table, (id_N, _) in ids.items()}, ids
        else:
            rows, asked = self.exchange.ask(ids, self.training)
        if self.training:
            self.seen = asked
        return rows

    def admit(self, step: int) -> dict[str, Tensor]:
        """After a step: each table's rows that belong to another id now. step: from 1."""
        changed = {table: self._map(table).admit(*found, step) for table, found in self.seen.items()}
        self.seen = {}
        return self.exchange.gather(changed) if self.exchange and changed else changed

    def _map(self, table: str) -> IdMap:
        return cast(IdMap, self.maps[table])  # or its sharded form (pipeline.training.parallel.id_maps)


def managed_tables(schema: Schema) -> dict[str, Managed]:
    """The managed tables of a schema."""
    return {name: table.managed for name, table in schema.all_tables.items() if table.managed}


def managed_ids(schema: Schema, device: str) -> ManagedIds | None:
    """For the managed tables of a schema, if it has any."""
    return ManagedIds(schema, device) if managed_tables(schema) else None


def with_rows(managed: ManagedIds | None, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A batch's ids, those of managed tables as rows."""
    return sparse if managed is None else managed(sparse)


torch.fx.wrap("with_rows")  # a loop over tables cannot be traced
