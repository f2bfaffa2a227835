"""The cluster of a plan as TorchRec's planner takes it: memory and bandwidths of ranks, and what a plan is rated by."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.types import CollectiveType, GeneralizedCommsBandwidth, ShardingOption

from pipeline.training.config import Settings
from pipeline.training.parallel.hardware import DEFAULT_LINK, DEFAULTS, Kind, Link
from pipeline.training.parallel.memory import TrainingBytes

RESERVE = 0.05  # of a GPU's memory, for CUDA's context, libraries, and what the allocator cannot use
# Of a communicator of NCCL: 32 channels, each with a buffer of 4 MiB (Simple) and about 6 MiB of its other protocols; a guess.
COMMUNICATOR = 32 * 10 * 2**20
MILLI = 1000  # TorchRec's planner takes bytes per millisecond


@dataclass(frozen=True)
class Cluster:
    """The ranks that a plan is for.

    Attributes:
        ranks: all of them. ranks_per_node: of each machine.
        device: where tables are trained.
        hbm: bytes of each rank's GPU; 0 without one. ddr: bytes of main memory for each rank.
        kind: of a rank; None: hardware.DEFAULTS. link: the network of a node.
    """

    ranks: int
    ranks_per_node: int
    device: Literal["cpu", "cuda"]
    hbm: int
    ddr: int
    kind: Kind | None = None
    link: Link = DEFAULT_LINK

    @property
    def figures(self) -> Kind:
        """Of its kind."""
        return self.kind or DEFAULTS[self.device]

    def available(self, dense: TrainingBytes, buffers: int = 0, copied: int = 0) -> tuple[int, int]:
        """Bytes of GPU and of main memory that a rank has for tables beside its dense part; negative if none.

        Args:
            buffers: bytes of activations and of communication.
            copied: of the dense part's copy that a checkpoint is written from.
        """
        if self.device == "cuda":
            return int(self.hbm * (1 - RESERVE)) - dense.total - buffers, self.ddr - copied
        return 0, self.ddr - dense.total - buffers - copied


def buffer_bytes(settings: Settings, cluster: Cluster, row_activations: float) -> int:
    """Bytes of a rank that its batch's activations and NCCL's communicators take.

    Args:
        row_activations: bytes that a row's dense part keeps for its backward.
    """
    rows = -(-settings.order(cluster.ranks).batch_size // cluster.ranks)
    activations = int(-(-rows // settings.accumulate) * row_activations)
    if cluster.device == "cpu":
        return activations
    # Of all ranks, of those of a node and of those across nodes; of groups, and across them. Fewer on one node.
    return activations + (5 if settings.sharding_group else 3) * COMMUNICATOR


class Bandwidths(GeneralizedCommsBandwidth):
    """Bytes per millisecond of a rank in a collective, as pipeline.training.parallel.step_time has them.

    A ring (reduce-scatter, all-gather, all-reduce) crosses a node's network once for all ranks of the node; the vectors of an
    all-to-all are each rank's own, so the ranks of a node share it.
    """

    def __init__(self, kind: Kind, link: Link, ranks_per_node: int) -> None:
        self.ranks_per_node = ranks_per_node
        self.within = kind.link * kind.link_share / MILLI
        self.between = link.rate * link.share / MILLI

    @property
    def intra_host_bw(self) -> float:
        """Of a rank to others of its node."""
        return self.within

    @property
    def inter_host_bw(self) -> float:
        """Of a rank to other nodes while all of its node send."""
        return self.between / self.ranks_per_node

    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float:
        """Called by the planner for a collective of world_size ranks, local_world_size of them on a node."""
        if world_size <= local_world_size:
            return self.within
        return self.inter_host_bw if collective_type == CollectiveType.ALL_TO_ALL else self.between


def topology(cluster: Cluster, room: tuple[int, int], ranks: int, local: int) -> Topology:
    """Of the ranks that share one replica of the tables, `local` of them on each node. room: see `Cluster.available`."""
    kind, (hbm, ddr) = cluster.figures, room
    memory = kind.memory_bandwidth * kind.bandwidth_share / MILLI
    return Topology(
        world_size=ranks,
        local_world_size=local,
        compute_device=cluster.device,
        hbm_cap=max(hbm, 0),
        ddr_cap=max(ddr, 0),
        hbm_mem_bw=memory,
        ddr_mem_bw=memory,  # where the tables of a CPU are; of a GPU's host it has no use
        hbm_to_ddr_mem_bw=kind.host_link * kind.link_share / MILLI,
        generalized_comms_bandwidths=Bandwidths(kind, cluster.link, min(cluster.ranks_per_node, cluster.ranks)),
    )


class TimeAndRoom(NoopPerfModel):
    """Rates a plan by a step's time, and by the memory that its fullest rank has above the average.

    A step may be a percent slower where it leaves that rank a percent more of its memory. By time alone a whole table goes to
    any rank that has room: of 167 GB on four GPUs of 80 GB one would hold 51 GB.

    Args:
        launch: milliseconds of a step beside its tables.
    """

    def __init__(self, topology: Topology, launch: float) -> None:
        super().__init__(topology)
        self.launch = launch
        self.ranks, self.memory = topology.world_size, "hbm" if topology.compute_device == "cuda" else "ddr"
        self.room = max(getattr(topology.devices[0].storage, self.memory), 1)  # before the planner gives any of it away

    def rate(self, plan: list[ShardingOption]) -> float:
        """Called by the planner for each of its proposals; less is better."""
        used: Counter[int] = Counter()
        for option in plan:
            for shard in option.shards:
                if shard.storage is not None:
                    used[shard.rank or 0] += getattr(shard.storage, self.memory)
        ranks = self.ranks
        excess = (max(used.values(), default=0) - sum(used.values()) / ranks) / self.room
        return (self.launch + super().rate(plan)) * (1 + excess)
