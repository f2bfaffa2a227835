"""Which rank holds which part of which table: TorchRec's planner under the constraints of a configuration."""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PartitionByType,
    PlannerError,
    ShardingOption,
    Storage,
)
from torchrec.distributed.planner.utils import reset_shard_rank
from torchrec.distributed.types import ModuleSharder, PipelineType, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.errors import UserError, one_line
from pipeline.training.config import Settings
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS
from pipeline.training.parallel import placements
from pipeline.training.parallel.cache import cache_rows
from pipeline.training.parallel.hardware import DEFAULTS, recognised
from pipeline.training.parallel.memory import (
    Estimate,
    PlanRecorder,
    TrainingBytes,
    checkpoint_copy_bytes,
    dense_bytes,
    estimate,
    readable,
    replicated,
    shard_bytes,
    total,
)
from pipeline.training.parallel.replicas import ranks_on_a_node
from pipeline.training.parallel.row_load import RowLoad
from pipeline.training.parallel.topology import MILLI, Cluster, TimeAndRoom, buffer_bytes, topology

GRID = 512  # combinations of placements up to which all are tried; above, a greedy search picks some
PATIENCE = 16  # combinations without a better one after which a greedy search ends

NOTHING_KNOWN = RowLoad()

logger = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    sharders: Sequence[ModuleSharder],
    tables: Sequence[BaseEmbeddingConfig],
    settings: Settings,
    device: torch.device,
    load: RowLoad = NOTHING_KNOWN,
    prefetch: bool = False,
) -> ShardingPlan:
    """The plan for the ranks of this process group, the same on all of them; rank 0 logs its estimate if there are several.

    With settings.sharding_group it is the plan of one group.

    Raises:
        UserError: as `place`, on every rank.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [place(model, sharders, tables, settings, current_cluster(device), load, prefetch)]
        except UserError as error:
            found = [str(error)]  # raised on all ranks
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    placed, estimated = found[0]
    if dist.get_rank() == 0 and dist.get_world_size() > 1:
        for line in estimated.lines():
            logger.info(line)
        if warning := estimated.costly_averages():
            logger.warning(warning)
    return placed


def current_cluster(device: torch.device) -> Cluster:
    """The ranks of this process group on machines like this one."""
    ranks = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if device.type != "cuda":
        return Cluster(ranks, local, "cpu", 0, _main_memory() // local)
    hbm, name = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
    if (kind := recognised(name, hbm)) is None:
        kind = DEFAULTS["cuda"]
        logger.info(f"no figures of {name}: tables are placed by those of {kind.name}")
    return Cluster(ranks, local, "cuda", hbm, _main_memory() // local, kind)


def _main_memory() -> int:
    """Bytes of this machine or, if that is less, of this container."""
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
    load: RowLoad = NOTHING_KNOWN,
    prefetch: bool = False,
) -> tuple[ShardingPlan, Estimate]:
    """The plan for any cluster, and its estimate. Needs no process group.

    Args:
        model: with the tables' modules, which may be on the meta device. sharders: of their kinds. tables: all of them.
        load: of an average row. prefetch: whether rows of cached tables are fetched a batch ahead.
    Raises:
        UserError: a placement, kernel or optimiser that does not exist there, makes results depend on the plan or loses state;
            or too little memory.
    """
    by_module = {sharder.module_type: sharder for sharder in sharders}
    group = settings.sharding_group or cluster.ranks
    if cluster.ranks % group:
        raise UserError(f"train.sharding_group={group} does not divide the {cluster.ranks} ranks: use a divisor")
    on_node = min(cluster.ranks_per_node, cluster.ranks)
    default = placements.default(cluster.device, group, on_node)
    placements.check(settings, placements.offered(model, by_module, cluster.device), cluster.device, default)
    placements.check_groups(settings, group, on_node)
    dense = dense_bytes(model, tuple(by_module), settings, cluster.ranks)
    local = ranks_on_a_node(group, on_node)
    batch = math.ceil(settings.order(cluster.ranks).batch_size / cluster.ranks)
    choices = placements.constraints(tables, settings, group, local, default, load.ids)
    buffers = buffer_bytes(settings, cluster, load.activations)
    optimizer, recorder = TABLE_OPTIMIZERS[settings.tables.name], PlanRecorder()
    with _quiet():
        room = cluster.available(dense, buffers, checkpoint_copy_bytes(dense, settings))
        shared = topology(cluster, room, group, local)
        memory = _Memory(settings, shared, choices, prefetch)
        speed = EmbeddingPerfEstimator(topology=shared, constraints=choices)
        options = EmbeddingEnumerator(shared, batch, choices, estimator=[speed, memory])
        planner = _planner(shared, batch, options, choices, recorder, cluster.figures.host * MILLI)
        try:
            placed = planner.plan(model, list(sharders))
        except PlannerError as error:
            found = options.last_stored_search_space or []
            raise UserError(_too_little_memory(found, settings, cluster, group, dense, buffers, error)) from None
    replicas, chosen = cluster.ranks // group, recorder.options
    cached = cache_rows(placed, chosen, room[0], prefetch)
    found = estimate(chosen, group, optimizer, dense, replicas, buffers, settings.sync_every)
    return placed, replace(found, cached=cached)


def _planner(
    shared: Topology,
    batch: int,
    options: EmbeddingEnumerator,
    choices: dict[str, ParameterConstraints],
    recorder: PlanRecorder,
    launch: float,
) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=shared,
        batch_size=batch,
        enumerator=options,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # `available` has left out what is not for tables
        proposer=[
            UniformProposer(),
            GridSearchProposer(GRID),
            GreedyProposer(threshold=PATIENCE),
            GreedyProposer(use_depth=False, threshold=PATIENCE),
        ],
        partitioner=BalancedPartitioner(),
        performance_model=TimeAndRoom(shared, launch),
        constraints=choices,
        stats=recorder,
        debug=False,
    )


class BalancedPartitioner(GreedyPerfPartitioner):
    """Gives each table that stays whole to the fastest rank, but to none that would have far more bytes than the others.

    A rank's limit is the mean over the ranks, or what it has of row-wise and replicated tables if that is more, and the largest
    part that is placed as one. Some rank is always below its share of the bytes, and any part fits there.
    """

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, *args: Any
    ) -> list[ShardingOption]:
        """Called by the planner with one placement for each table; sets the ranks of their shards."""
        devices = storage_constraint.devices
        before = [device.storage for device in devices]
        hbm, ddr = (self._limit(proposal, memory, len(devices)) for memory in ("hbm", "ddr"))
        try:
            for device, storage in zip(devices, before, strict=True):
                device.storage = Storage(min(storage.hbm, hbm), min(storage.ddr, ddr), storage.ssd)
            return super().partition(proposal, storage_constraint, *args)
        except PlannerError:  # one rank cannot keep both limits, or a table_row_wise table finds no machine that can
            reset_shard_rank(proposal)
        finally:
            for device, storage in zip(devices, before, strict=True):
                device.storage = storage
        return super().partition(proposal, storage_constraint, *args)

    @staticmethod
    def _limit(proposal: Sequence[ShardingOption], memory: str, ranks: int) -> int:
        everywhere, parts, largest = 0, 0, 0
        for option in proposal:
            sizes = [getattr(shard.storage, memory) for shard in option.shards]
            parts += sum(sizes)
            if option.partition_by == PartitionByType.UNIFORM.value:
                everywhere += max(sizes)
            else:
                largest = max(largest, *sizes)
        return max(math.ceil(parts / ranks), everywhere) + largest


class _Memory(EmbeddingStorageEstimator):
    """Adds what the planner's bytes leave out: an optimiser's state, a replicated table's gradient, a checkpoint's copy."""

    def __init__(
        self, settings: Settings, topology: Topology, constraints: dict[str, ParameterConstraints], prefetch: bool
    ) -> None:
        ahead = prefetch and any("fused_uvm_caching" in allowed for allowed in settings.kernels.values())
        # Ids and rows of three batches; embeddings, which are counted otherwise without being asked for.
        kind = {"pipeline_type": PipelineType.TRAIN_PREFETCH_SPARSE_DIST, "run_embedding_at_peak_memory": True}
        super().__init__(topology=topology, constraints=constraints, **(kind if ahead else {}))
        self.settings, self.device = settings, topology.compute_device
        self.optimizer = TABLE_OPTIMIZERS[settings.tables.name]

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Sets the storage of each shard."""
        super().estimate(sharding_options, *args, **kwargs)
        for option in sharding_options:
            for shard in option.shards:
                found = shard_bytes(option, shard, self.optimizer)
                more, hbm = found.gradients + found.state, 0
                if self.device == "cuda":
                    cached = option.compute_kernel == "fused_uvm_caching"
                    hbm = self.optimizer.row_bytes(shard.size[0]) if cached else more
                ddr = more - hbm + checkpoint_copy_bytes(found, self.settings)
                shard.storage = (shard.storage or Storage(0, 0)) + Storage(hbm, ddr)


def _too_little_memory(
    options: Sequence[ShardingOption],
    settings: Settings,
    cluster: Cluster,
    ranks: int,
    dense: TrainingBytes,
    buffers: int,
    error: PlannerError,
) -> str:
    """By how much tables do not fit, and what may help."""
    optimizer = TABLE_OPTIMIZERS[settings.tables.name]
    lighter = ["train.tables.name=rowwise_adagrad"] if "element" in optimizer.state else []
    rooms = cluster.available(dense, buffers, checkpoint_copy_bytes(dense, settings))
    for memory, room in zip(("hbm", "ddr"), rooms, strict=True):
        if memory == "hbm" and cluster.device == "cpu":
            continue
        where = "GPU memory" if memory == "hbm" else "memory"
        if room < 0:
            return (
                f"the dense part alone takes {readable(dense.total)}, its activations and communication {readable(buffers)}: "
                f"{readable(-room)} more than a rank has of {where}. "
                "Try ranks with more memory, train.accumulate=4, train.dense_parallel=fsdp, a smaller model."
            )
        other = ["train.kernels.default=[fused_uvm_caching]"] if memory == "hbm" else []
        if memory == "ddr" and settings.checkpoint_async:
            other = ["train.checkpoint_async=false, which needs no copy"]
        helpful = ", ".join([*other, *lighter, "a smaller dim"])
        needs = _needs(options, settings, memory)
        whole, have = sum(need.whole for need in needs), room * ranks
        if whole > have:
            return (
                f"the tables with their batches need {readable(whole)} and {ranks} ranks have {readable(have)} of {where} "
                f"for them: {readable(whole - have)} too much. Try {_more_ranks(needs, ranks, room, cluster)}, {helpful}."
            )
        widest = max(needs, key=lambda need: need.widest)
        if widest.widest > room:
            over, helpful = widest.widest - room, f"+train.sharding.{widest.table}=[row_wise], {helpful}"
            return (
                f"table {widest.table} needs {readable(widest.widest)} on one rank, which has {readable(room)} of {where} "
                f"for tables: {readable(over)} too much. Try {helpful}."
            )
    return (
        f"the tables cannot be placed on {ranks} ranks; row_wise for all of them may help. The planner's error: "
        f"{one_line(error)}"
    )


@dataclass(frozen=True)
class _Need:
    """The fewest bytes of one kind of memory that a table takes.

    Attributes:
        whole: over all ranks. shared: of these the ones that more ranks divide among them. widest: on one rank.
    """

    table: str
    whole: int
    shared: int
    widest: int


def _needs(options: Sequence[ShardingOption], settings: Settings, memory: str) -> list[_Need]:
    by_table: dict[str, list[_Need]] = {}
    optimizer = TABLE_OPTIMIZERS[settings.tables.name]
    for option in options:
        parts = [getattr(shard.storage, memory) for shard in option.shards]
        size = total(shard_bytes(option, shard, optimizer) for shard in option.shards)
        shared = size.total + (checkpoint_copy_bytes(size, settings) if memory == "ddr" else 0)
        need = _Need(option.name, sum(parts), 0 if replicated(option) else min(sum(parts), shared), max(parts))
        by_table.setdefault(option.name, []).append(need)
    return [
        replace(min(found, key=lambda n: n.whole), widest=min(n.widest for n in found)) for found in by_table.values()
    ]


def _more_ranks(needs: Sequence[_Need], ranks: int, room: int, cluster: Cluster) -> str:
    """How many ranks would have enough memory, on whole machines; a batch takes some of it on each."""
    shared, whole = sum(need.shared for need in needs), sum(need.whole for need in needs)
    left = room - (whole - shared) // ranks
    if left <= 0:
        return "ranks with more memory"
    nodes = math.ceil(math.ceil(shared / left) / cluster.ranks_per_node)
    return f"{nodes * cluster.ranks_per_node} ranks or more"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the planner, which logs to the root logger as well and warns."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
