"""Maps of ids on several ranks: each rank has some sets of each map, and asks the others for the rest."""

# Shapes: V ids of all tables, M of them that a rank is asked for; N distinct ids of a table in ascending order; R ranks,
# K tables, S sets, W rows of a set, C rows that have changed hands.

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from features.errors import UserError
from models.id_map import IdMap, set_of
from models.managed import Ids
from models.ranker import Ranker
from pipeline.torch_compat import OwnState
from pipeline.training.config import Settings


class ShardedIdMap(OwnState):
    """A map of ids of which each rank has some sets, in their order; what is asked of it goes through MapExchange.

    In a state dict it has the names, shapes and contents of the whole map: a checkpoint fits any number of ranks, or none.
    """

    def __init__(self, whole: IdMap, mesh: DeviceMesh) -> None:
        super().__init__()
        self.ranks, self.settings, self.mesh = mesh.size(), whole.settings, mesh
        self.share = -(-whole.settings.sets // self.ranks)  # as DTensor cuts
        first = min(mesh.get_rank() * self.share, whole.settings.sets)
        sets = min(self.share, whole.settings.sets - first)
        # In a tuple: DDP would make the buffers of a submodule the same on all ranks.
        self.part = (IdMap(whole.settings, first, sets, torch.device(mesh.device_type)),)

    def rank_of(self, id_N: Tensor) -> Tensor:
        """The rank that has the set of an id; it rises with the id."""
        return set_of(id_N, self.settings.sets) // self.share

    def lookup(self, id_M: Tensor) -> Tensor:
        """As IdMap.lookup, for ids of this rank's sets."""
        return self.part[0].lookup(id_M)

    def admit(self, id_M: Tensor, count_M: Tensor, step: int) -> Tensor:
        """As IdMap.admit, for the ids that ranks have asked this one for, in any order."""
        id_N, place_M = id_M.unique(return_inverse=True)
        count_N = torch.zeros_like(id_N).index_add_(0, place_M, count_M)
        return self.part[0].admit(id_N, count_N, step)

    def own_state(self) -> dict[str, Tensor]:
        """The buffers of the whole map, sharded by set."""
        whole = torch.Size((self.settings.sets, self.settings.ways))
        layout: dict[str, Any] = {"run_check": False, "shape": whole, "stride": (whole[1], 1)}
        buffers = self.part[0].named_buffers()
        return {name: DTensor.from_local(local, self.mesh, [Shard(0)], **layout) for name, local in buffers}


class MapExchange:
    """models.managed.Exchange over the ranks: a number of messages that does not depend on that of the tables.

    Ids travel with their counts, so a step's `admit` needs no further message. The host waits once in each method, for sizes.
    """

    def __init__(self, maps: Mapping[str, ShardedIdMap]) -> None:
        self.maps, self.ranks = maps, dist.get_world_size()

    def ask(self, ids: Ids, keep: bool) -> tuple[dict[str, Tensor], Ids]:
        """The rows of this rank's ids: sizes, ids and rows are three all-to-alls."""
        rank_V = torch.cat([self.maps[table].rank_of(id_N) for table, (id_N, _) in ids.items()])
        sent_RK = self._sizes(rank_V, [len(id_N) for id_N, _ in ids.values()])
        asked_RK = torch.empty_like(sent_RK)
        dist.all_to_all_single(asked_RK, sent_RK)
        sent, asked = torch.stack([sent_RK, asked_RK]).tolist()
        send, receive = ([sum(of_rank) for of_rank in sizes] for sizes in (sent, asked))
        columns = [torch.cat(column) for column in zip(*ids.values(), strict=True)]
        by_rank_V = rank_V.argsort(stable=True)
        found_M = _exchange(torch.stack(columns[: 1 + keep], 1)[by_rank_V], send, receive)
        by_table_M = _table_of(asked_RK, len(found_M)).argsort(stable=True)
        parts = found_M[by_table_M].split([sum(of_table) for of_table in zip(*asked, strict=True)])
        answers = [self.maps[table].lookup(part[:, 0]) for table, part in zip(ids, parts, strict=True)]
        row_M = _put_back(torch.cat(answers), by_table_M)
        row_V = _put_back(_exchange(row_M, receive, send), by_rank_V)
        rows = dict(zip(ids, row_V.split([len(id_N) for id_N, _ in ids.values()]), strict=True))
        return rows, {table: (part[:, 0], part[:, 1]) for table, part in zip(ids, parts, strict=True)} if keep else {}

    def gather(self, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all ranks: sizes and rows are two all-gathers."""
        row_C = torch.cat(list(changed.values()))
        size_K = torch.tensor([len(rows) for rows in changed.values()], device=row_C.device)
        size_RK = size_K.new_empty(self.ranks, len(changed))
        dist.all_gather_into_tensor(size_RK.view(-1), size_K)
        sizes = size_RK.tolist()
        if not (longest := max(sum(of_rank) for of_rank in sizes)):
            return changed
        row_RC = row_C.new_empty(self.ranks, longest)
        dist.all_gather_into_tensor(row_RC.view(-1), nn.functional.pad(row_C, (0, longest - len(row_C))))
        # Of each rank the padding counts as one table more, the last.
        padded = torch.cat([size_RK, longest - size_RK.sum(1, keepdim=True)], 1)
        order = _table_of(padded, row_RC.numel()).argsort(stable=True)
        totals = [sum(of_table) for of_table in zip(*sizes, strict=True)]
        rows = row_RC.flatten()[order[: sum(totals)]].split(totals)
        return dict(zip(changed, rows, strict=True))

    def _sizes(self, rank_V: Tensor, lengths: Sequence[int]) -> Tensor:
        """How many ids of each table go to each rank: sent_RK."""
        bound_R1 = torch.arange(self.ranks + 1, device=rank_V.device)
        ends = [torch.searchsorted(rank_N.contiguous(), bound_R1) for rank_N in rank_V.split(list(lengths))]
        return torch.stack(ends, 1).diff(dim=0).contiguous()


def shard_maps(ranker: Ranker, settings: Settings, device: torch.device) -> None:
    """Replaces the maps of ids by this rank's parts of them, empty.

    Raises:
        UserError: settings that exclude managed tables.
    """
    if ranker.managed is None:
        return
    ranks, maps = dist.get_world_size(), ranker.managed.maps
    for table in maps:
        _check(table, settings, ranks)
    mesh = init_device_mesh(device.type, (ranks,)) if ranks > 1 else None
    for table, found in maps.items():
        whole = cast(IdMap, found)
        maps[table] = ShardedIdMap(whole, mesh) if mesh else IdMap(whole.settings, device=device)
    if mesh:
        ranker.managed.exchange = MapExchange({table: cast(ShardedIdMap, part) for table, part in maps.items()})


def _check(table: str, settings: Settings, ranks: int) -> None:
    kernels = settings.kernels.get(table, settings.kernels.get("default", ["fused"]))
    wrong = None
    if settings.sharding_group not in (None, ranks):
        wrong = "sharding_group", "replicas of it would need replicas of its map of ids. Leave it out."
    elif settings.pipelined:
        wrong = "pipelined", "the row of an id is known only after the step before. Leave it out."
    elif set(kernels) != {"fused"}:
        wrong = f"kernels.{table}", "a cache would keep the old values of rows that are reset. Use [fused]."
    if wrong:
        raise UserError(f"train.{wrong[0]}: table {table} is managed, and {wrong[1]}")


def _exchange(x_N: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """All-to-all: sends each rank its rows of `x_N`, and returns the rows that the others send to this one."""
    found = x_N.new_empty(sum(received), *x_N.shape[1:])
    dist.all_to_all_single(found, x_N.contiguous(), received, sent)
    return found


def _table_of(size_RK: Tensor, count: int) -> Tensor:
    """The table, from 0, of each of `count` entries that lie rank by rank and of each rank table by table."""
    end_RK = size_RK.flatten().cumsum(0)
    return torch.searchsorted(end_RK, torch.arange(count, device=end_RK.device), right=True) % size_RK.shape[1]


def _put_back(x_N: Tensor, order_N: Tensor) -> Tensor:
    """The inverse of x_N[order_N]."""
    return torch.empty_like(x_N).index_copy_(0, order_N, x_N)
