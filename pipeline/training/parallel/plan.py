"""Which rank holds which part of which table: TorchRec's planner under the constraints of a configuration."""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Storage
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.errors import UserError
from pipeline.training.config import Allowed, Settings
from pipeline.training.parallel.memory import Chosen, Estimate, Load, dense_load, estimate, replicated, shard_load, size

PLACEMENTS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel")
KERNELS = ("fused", "fused_uvm_caching")
DEFAULT = ("table_wise", "row_wise")
FREE = 0.15  # of a GPU's memory, for activations and what its libraries take
COLUMNS = 32  # of a column-wise shard at least, though a narrow table may be halved
GRID = 512  # combinations of placements that are all tried; of more, those that a greedy search comes to
PATIENCE = 16  # combinations without a better one after which a greedy search ends

logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)  # advice to library authors


@dataclass(frozen=True)
class Cluster:
    """What a plan is for.

    Attributes:
        ranks: all of them. ranks_per_node: neighbours on one machine.
        device: where tables are trained.
        hbm: bytes of each rank's GPU; 0 without one. ddr: bytes of main memory for each rank.
    """

    ranks: int
    ranks_per_node: int
    device: Literal["cpu", "cuda"]
    hbm: int
    ddr: int

    def room(self, dense: Load) -> tuple[int, int]:
        """Bytes of GPU and of main memory that a rank has left for tables beside its dense part; negative if none."""
        if self.device == "cuda":
            return int(self.hbm * (1 - FREE)) - dense.total, self.ddr
        return 0, self.ddr - dense.total


def plan(
    model: nn.Module,
    sharders: Sequence[ModuleSharder],
    tables: Sequence[BaseEmbeddingConfig],
    settings: Settings,
    device: torch.device,
) -> ShardingPlan:
    """The plan of the ranks of this process group, the same on all of them; several ranks are told what it comes to.

    Of settings.sharding_group ranks it is the plan of one group.

    Raises:
        UserError: as `place`, on every rank.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [place(model, sharders, tables, settings, here(device))]
        except UserError as error:
            found = [str(error)]  # the others wait for it
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    placed, estimated = found[0]
    if dist.get_rank() == 0 and dist.get_world_size() > 1:
        print("\n".join(estimated.lines()), flush=True)
    return placed


def here(device: torch.device) -> Cluster:
    """The ranks of this process group on machines like this one."""
    ranks = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return Cluster(ranks, local, "cuda" if device.type == "cuda" else "cpu", hbm, _main_memory() // local)


def _main_memory() -> int:
    """Bytes that this machine or, if less, this container has."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(given)) if given.isdecimal() else machine


def place(
    model: nn.Module,
    sharders: Sequence[ModuleSharder],
    tables: Sequence[BaseEmbeddingConfig],
    settings: Settings,
    cluster: Cluster,
) -> tuple[ShardingPlan, Estimate]:
    """The plan for a cluster, be it here or not, and what it comes to. Needs no process group.

    Args:
        model: with the tables' modules, which may be on the meta device. sharders: of their kinds. tables: all of them.
    Raises:
        UserError: a placement, kernel or optimiser that does not exist there, or would make results depend on the plan or lose
            state; or no room.
    """
    offered = _offered(model, {sharder.module_type: sharder for sharder in sharders}, cluster.device)
    _check(settings, offered, cluster.device)
    group = settings.sharding_group or cluster.ranks
    if cluster.ranks % group:
        raise UserError(f"train.sharding_group={group} does not divide the {cluster.ranks} ranks: take a divisor")
    dense = dense_load(model, tuple(sharder.module_type for sharder in sharders), settings, cluster.ranks)
    hbm, ddr = cluster.room(dense)
    topology = Topology(
        world_size=group,
        local_world_size=max(1, min(cluster.ranks_per_node, cluster.ranks) * group // cluster.ranks),
        compute_device=cluster.device,
        hbm_cap=max(hbm, 0),
        ddr_cap=max(ddr, 0),
    )
    batch, constraints = settings.batch_size // cluster.ranks, _constraints(tables, settings, group)
    memory = _Memory(settings.tables.name, topology, constraints)
    speed = EmbeddingPerfEstimator(topology=topology, constraints=constraints)
    options = EmbeddingEnumerator(topology, batch, constraints, estimator=[speed, memory])
    chosen = Chosen()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch,
        enumerator=options,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # `room` has left out what is not for tables
        proposer=[
            UniformProposer(),
            GridSearchProposer(GRID),
            GreedyProposer(threshold=PATIENCE),
            GreedyProposer(use_depth=False, threshold=PATIENCE),
        ],
        constraints=constraints,
        stats=chosen,
        debug=False,
    )
    try:
        with _quiet():
            placed = planner.plan(model, list(sharders))
    except PlannerError as error:
        raise UserError(
            _no_room(options.last_stored_search_space or [], settings, cluster, group, dense, error)
        ) from None
    return placed, estimate(chosen.options, group, settings.tables.name, dense, cluster.ranks // group)


def _check(settings: Settings, offered: Mapping[str, set[str]], device: str) -> None:
    """Whether tables can be trained so.

    Args:
        offered: of each table, the placements that its module can have on `device`.
    Raises:
        UserError: naming the setting and the reason.
    """
    for key, allowed, known in (("sharding", settings.sharding, PLACEMENTS), ("kernels", settings.kernels, KERNELS)):
        for table, values in allowed.items():
            if table != "default" and table not in offered:
                raise UserError(f"train.{key}.{table}: no such table, there are {', '.join(sorted(offered))}")
            if wrong := sorted(set(values) - set(known)):
                raise UserError(f"train.{key}.{table}: {wrong[0]} is not allowed, choose from {', '.join(known)}")
    for table, placements in settings.sharding.items():
        if reason := _never(placements, settings, device):
            raise UserError(f"train.sharding.{table}: {reason}")
    if settings.tables.name == "adam" and device == "cpu":
        raise UserError(
            "train.tables.name=adam: fused Adam has no CPU kernel. Use rowwise_adagrad, adagrad or sgd here."
        )
    for table, kernels in settings.kernels.items():
        if "fused_uvm_caching" in kernels and device == "cpu":
            raise UserError(
                f"train.kernels.{table}: fused_uvm_caching keeps a table in main memory and caches its rows on a GPU; on a CPU "
                "it is there already. Use fused."
            )
        if table != "default" and set(_allowed(settings.sharding, table, DEFAULT)) == {"data_parallel"}:
            raise UserError(f"train.kernels.{table}: a data_parallel table has one kernel, its own. Leave this out.")
    for table, possible in offered.items():
        if not possible & set(placements := _allowed(settings.sharding, table, DEFAULT)):
            raise UserError(
                f"train.sharding: table {table} cannot be {' or '.join(placements)} on {device}, only "
                f"{', '.join(sorted(possible & set(PLACEMENTS)))}: say +train.sharding.{table}=[...]"
            )


def _never(placements: Sequence[str], settings: Settings, device: str) -> str | None:
    """Why tables must not be placed so, if they must not."""
    if "column_wise" in placements and settings.tables.name == "rowwise_adagrad":
        return (
            "column_wise with rowwise_adagrad keeps one momentum per column shard, so the result would depend on the plan. "
            "Use train.tables.name=adagrad, or table_wise and row_wise."
        )
    if "data_parallel" in placements and settings.sharding_group:
        return (
            "a data_parallel table is the same within a sharding_group alone: nothing averages its copies over the groups. Use "
            "table_wise and row_wise."
        )
    if "data_parallel" in placements and settings.tables.name == "adam":
        return (
            "fused Adam moves the rows of a batch alone, and the gradient of a data_parallel table does not say which these "
            "are, so the result would depend on the plan. Use another train.tables.name, or table_wise and row_wise."
        )
    if "table_row_wise" in placements and device == "cpu":
        return "table_row_wise has no CPU kernel. Use table_wise or row_wise."
    return None


def _offered(module: nn.Module, sharders: Mapping[type, ModuleSharder], device: str) -> dict[str, set[str]]:
    """Of each table in `module`, the placements that its sharder has."""
    if sharder := sharders.get(type(module)):
        return {name: set(sharder.sharding_types(device)) for name in sharder.shardable_parameters(module)}
    children = [_offered(child, sharders, device) for child in module.children()]
    return {name: types for child in children for name, types in child.items()}


def _allowed(settings: Allowed, table: str, otherwise: Sequence[str]) -> list[str]:
    """What a setting allows to a table: its own entry, or the default."""
    return list(settings.get(table) or settings.get("default") or otherwise)


def _constraints(
    tables: Sequence[BaseEmbeddingConfig], settings: Settings, ranks: int
) -> dict[str, ParameterConstraints]:  # fmt: skip
    """What the planner may do with each table.

    One rank has nobody to share with: all placements are the same there, and table-wise is the cheapest.
    """
    return {
        table.name: ParameterConstraints(
            sharding_types=_allowed(settings.sharding, table.name, DEFAULT) if ranks > 1 else ["table_wise"],
            compute_kernels=[*_allowed(settings.kernels, table.name, ["fused"]), "dense"],  # that of data_parallel
            min_partition=max(table.embedding_dim // ranks, min(COLUMNS, table.embedding_dim // 2), 1),
            pooling_factors=[1.0] * len(table.feature_names),  # one id a row; bags are short
        )
        for table in tables
    }


class _Memory(EmbeddingStorageEstimator):
    """Adds to the planner's bytes what it leaves out: a fused optimiser's state, and a replicated table's gradient."""

    def __init__(self, optimizer: str, topology: Topology, constraints: dict[str, ParameterConstraints]) -> None:
        super().__init__(topology=topology, constraints=constraints)
        self.optimizer, self.device = optimizer, topology.compute_device

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Sets the storage of each shard."""
        super().estimate(sharding_options, *args, **kwargs)
        for option in sharding_options:
            # Beside a cache, FBGEMM keeps a momentum per row on the GPU, larger state in main memory.
            aside = option.compute_kernel == "fused_uvm_caching" and self.optimizer != "rowwise_adagrad"
            for shard in option.shards:
                load = shard_load(option, shard, self.optimizer)
                more = load.gradients + load.state
                on_gpu = self.device == "cuda" and not aside
                shard.storage = (shard.storage or Storage(0, 0)) + Storage(more if on_gpu else 0, 0 if on_gpu else more)


def _no_room(
    options: Sequence[ShardingOption], settings: Settings, cluster: Cluster, ranks: int, dense: Load, error: PlannerError
) -> str:  # fmt: skip
    """By how much tables do not fit, and what may help."""
    lighter = [] if settings.tables.name in ("sgd", "rowwise_adagrad") else ["train.tables.name=rowwise_adagrad"]
    for memory, room in zip(("hbm", "ddr"), cluster.room(dense), strict=True):
        if memory == "hbm" and cluster.device == "cpu":
            continue
        where = "GPU memory" if memory == "hbm" else "memory"
        if room < 0:
            return (
                f"the dense part alone takes {size(dense.total)}, {size(-room)} more than the {where} that a rank has for it. "
                "Try ranks with more memory, train.dense_parallel=fsdp, a smaller model."
            )
        cached = ["train.kernels.default=[fused_uvm_caching]"] if memory == "hbm" else []
        helpful = ", ".join([*cached, *lighter, "a smaller dim"])
        needs = _needs(options, settings.tables.name, memory)
        whole, have = sum(need.whole for need in needs), room * ranks
        if whole > have:
            return (
                f"the tables with their batches need {size(whole)} and {ranks} ranks have {size(have)} of {where} for them: "
                f"{size(whole - have)} too much. Try {_more_ranks(needs, ranks, room, cluster)}, {helpful}."
            )
        widest = max(needs, key=lambda need: need.widest)
        if widest.widest > room:
            return (
                f"table {widest.table} needs {size(widest.widest)} on one rank, which has {size(room)} of {where} for tables: "
                f"{size(widest.widest - room)} too much. Try +train.sharding.{widest.table}=[row_wise], {helpful}."
            )
    told = " ".join(str(error).split())[:200]
    return f"the tables cannot be placed on {ranks} ranks; row_wise for all of them may help. The planner says: {told}"


@dataclass(frozen=True)
class _Need:
    """Bytes that a table takes at the least, as far as one kind of memory goes.

    Attributes:
        whole: over all ranks. shared: of it what more ranks share out, since they hold one copy. widest: on one rank.
    """

    table: str
    whole: int
    shared: int
    widest: int


def _needs(options: Sequence[ShardingOption], optimizer: str, memory: str) -> list[_Need]:
    by_table: dict[str, list[_Need]] = {}
    for option in options:
        parts = [getattr(shard.storage, memory) for shard in option.shards]
        copy = 0 if replicated(option) else sum(shard_load(option, s, optimizer).total for s in option.shards)
        need = _Need(option.name, sum(parts), min(sum(parts), copy), max(parts))
        by_table.setdefault(option.name, []).append(need)
    return [
        replace(min(found, key=lambda n: n.whole), widest=min(n.widest for n in found)) for found in by_table.values()
    ]


def _more_ranks(needs: Sequence[_Need], ranks: int, room: int, cluster: Cluster) -> str:
    """How many ranks would have room, on whole machines; a batch takes some on each."""
    shared, whole = sum(need.shared for need in needs), sum(need.whole for need in needs)
    left = room - (whole - shared) // ranks
    if left <= 0:
        return "ranks with more memory"
    nodes = math.ceil(math.ceil(shared / left) / cluster.ranks_per_node)
    return f"{nodes * cluster.ranks_per_node} ranks or more"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the planner's advice, some of it to the root logger and by warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
