"""Tables for an unbounded id space (features.schema.kinds.Managed): ids are mapped to rows as they appear in training."""

# Shapes: V ids of a batch, N distinct ids in ascending order, S sets, W rows of a set, A ids without a row, T sets of them.

from typing import Protocol, cast

import torch
import torch.fx
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from features.fit.encoders import MISSING, UNKNOWN
from features.kinds.tables import Managed
from features.schema.schema import Schema

FIRST = UNKNOWN + 1  # row of the first set; those before it are for missing values and for ids without a row
FREE = 0  # an unused row: no value has this id, which stands for missing ones
IN_STEP = torch.iinfo(torch.int64).max  # usage of ids of the current step: never evicted


class IdMap(nn.Module):
    """Which id has which row of a table, or of some sets of it.

    Its entries have the order of the table's rows, and an id's set is a function of the id alone: sets can be sharded over any
    number of ranks without a change of any id's row.

    Args:
        settings: the table's. first, sets: the range of sets that it holds; all by default.
    """

    id_SW: Tensor
    used_SW: Tensor

    def __init__(
        self, settings: Managed, first: int = 0, sets: int | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.settings, self.first = settings, first
        shape = settings.sets if sets is None else sets, settings.ways
        self.register_buffer("id_SW", torch.full(shape, FREE, dtype=torch.int64, device=device))
        # lru: the step in which an id was last seen; lfu: how often it was seen.
        self.register_buffer("used_SW", torch.zeros(shape, dtype=torch.int64, device=device))

    def lookup(self, id_N: Tensor) -> Tensor:
        """row_N of the table; UNKNOWN for an id without a row."""
        set_N, way_N, found_N = self._find(id_N)
        return torch.where(found_N, self._row(set_N, way_N), UNKNOWN)

    def admit(self, id_N: Tensor, count_N: Tensor, step: int) -> Tensor:
        """Records the ids of a step, and assigns rows to new ones by eviction.

        Ids of this step are not evicted. Where a set has fewer other rows than new ids, the largest new ids get no row.
        The host waits for a GPU twice: for the number of new ids, and of those that get a row. Elsewhere what does not count
        is written as a difference of 0.

        Args:
            id_N, count_N: distinct ids, ascending, and how often each was there; MISSING is left out. step: from 1.
        Returns: the rows of the table that belong to another id now.
        """
        set_N, way_N, found_N = self._find(id_N)
        here_N = found_N & (id_N != MISSING)
        used, ways = self.used_SW.view(-1), self.settings.ways
        place_N = set_N * ways + way_N
        before_N = used[place_N]
        used.index_add_(0, place_N, torch.where(here_N, IN_STEP - before_N, 0))
        new_A = (~here_N & (id_N != MISSING)).nonzero().squeeze(1)
        enough_A, place_A = self._least_used(set_N[new_A])
        for slots, value_A in (
            (self.id_SW.view(-1), id_N[new_A]),
            (used, self._seen(used[place_A], count_N[new_A], step)),
        ):
            slots.index_add_(0, place_A, torch.where(enough_A, value_A - slots[place_A], 0))
        used.index_add_(0, place_N, torch.where(here_N, self._seen(before_N, count_N, step) - IN_STEP, 0))
        return FIRST + self.first * ways + place_A[enough_A]

    def _least_used(self, set_A: Tensor) -> tuple[Tensor, Tensor]:
        """Of new ids, ordered by set: whether there is a row for each that no id of this step has, and its place among all.

        The first of a set takes the row of the smallest usage, the second the next.
        """
        sets, ways = self.used_SW.shape
        which_A = (set_A != set_A.roll(1)).cumsum(0)
        which_A = which_A - which_A[:1]
        set_T = set_A.new_zeros(min(len(set_A), sets)).index_copy_(0, which_A, set_A)  # equal where it is written twice
        used_TW = self.used_SW.index_select(0, set_T)
        nth_A = torch.arange(len(set_A), device=set_A.device) - torch.searchsorted(set_A, set_A)
        enough_A = nth_A < (used_TW < IN_STEP).sum(1)[which_A]
        way_A = used_TW.argsort(stable=True)[which_A, nth_A.clamp(max=ways - 1)]
        return enough_A, set_A * ways + way_A

    def _find(self, id_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        set_N = set_of(id_N, self.settings.sets) - self.first
        match_NW = self.id_SW.index_select(0, set_N) == id_N.unsqueeze(1)
        found_N, way_N = match_NW.to(torch.uint8).max(1)  # cheaper than any and argmax
        return set_N, way_N, found_N.bool()

    def _row(self, set_N: Tensor, way_N: Tensor) -> Tensor:
        return FIRST + (self.first + set_N) * self.settings.ways + way_N

    def _seen(self, used_N: Tensor, count_N: Tensor, step: int) -> Tensor:
        return used_N + count_N if self.settings.evict == "lfu" else torch.full_like(used_N, step)


def set_of(id_N: Tensor, sets: int) -> Tensor:
    """The set of each id: sets divide the range of ids, 0 to 2**63 - 1, into equal parts, in its order."""
    return (id_N >> 32) * sets >> 31


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
