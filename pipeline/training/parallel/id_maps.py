"""Maps of ids on several ranks: each rank has some sets of a map, and asks the others for the rest."""

# Shapes: N distinct ids of a rank in ascending order, M ids that a rank is asked for, S sets, W rows of a set.

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from features.errors import UserError
from models.managed import IdMap, set_of
from models.ranker import Ranker
from pipeline.torch_compat import OwnState
from pipeline.training.config import Settings


class ShardedIdMap(OwnState):
    """A map of ids of which each rank has some sets, in their order; with IdMap's methods, which all ranks call together.

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

    def lookup(self, id_N: Tensor) -> Tensor:
        """As IdMap.lookup, for this rank's ids."""
        sent, asked = self._sizes(id_N)
        row_M = self.part[0].lookup(_exchange(id_N, sent, asked))
        return _exchange(row_M, asked, sent)

    def admit(self, id_N: Tensor, count_N: Tensor, step: int) -> Tensor:
        """As IdMap.admit, for the ids of all ranks; returns the rows of all ranks."""
        sent, asked = self._sizes(id_N)
        pair_M2 = _exchange(torch.stack([id_N, count_N], 1), sent, asked)
        id_U, place_M = pair_M2[:, 0].unique(return_inverse=True)
        count_U = torch.zeros_like(id_U).index_add_(0, place_M, pair_M2[:, 1])
        return _gathered(self.part[0].admit(id_U, count_U, step))

    def _sizes(self, id_N: Tensor) -> tuple[list[int], list[int]]:
        """How many ids go to each rank, and how many come from each."""
        sent = (set_of(id_N, self.settings.sets) // self.share).bincount(minlength=self.ranks)
        asked = torch.empty_like(sent)
        dist.all_to_all_single(asked, sent)
        return sent.tolist(), asked.tolist()

    def own_state(self) -> dict[str, Tensor]:
        """The buffers of the whole map, sharded by set."""
        whole = torch.Size((self.settings.sets, self.settings.ways))
        layout: dict[str, Any] = {"run_check": False, "shape": whole, "stride": (whole[1], 1)}
        buffers = self.part[0].named_buffers()
        return {name: DTensor.from_local(local, self.mesh, [Shard(0)], **layout) for name, local in buffers}


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


def _gathered(x_N: Tensor) -> Tensor:
    """The entries of all ranks, one after the other."""
    counts = [torch.zeros(1, dtype=torch.int64, device=x_N.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], len(x_N)))
    sizes = torch.cat(counts).tolist()
    padded = [x_N.new_empty(max(sizes)) for _ in sizes]
    dist.all_gather(padded, nn.functional.pad(x_N, (0, max(sizes) - len(x_N))))
    return torch.cat([found[:size] for found, size in zip(padded, sizes, strict=True)])
