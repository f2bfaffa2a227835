"""The memory and the expected work of a sharding plan, by table and by rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn
from torchrec.distributed.planner.types import Shard, ShardingOption, Stats
from torchrec.distributed.types import ShardingType

from pipeline.training.config import Settings
from pipeline.training.optim.table_optimizers import FusedOptimizer

TABLES, RANKS = 8, 4  # the most that are printed one by one
LARGE = 100 * 10**6  # bytes that a rank sends in a step to average tables, from which on they are worth a warning
DENSE_STATE = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": 0}  # numbers per parameter


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of something in training: weights, gradients that are kept, the optimiser's state."""

    weights: int = 0
    gradients: int = 0
    state: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.state

    def __add__(self, other: "TrainingBytes") -> "TrainingBytes":
        return TrainingBytes(self.weights + other.weights, self.gradients + other.gradients, self.state + other.state)


@dataclass(frozen=True)
class TableEstimate:
    """One table: its size, its placement, and the bytes of one replica; ranks: how many have a part of it."""

    name: str
    rows: int
    dim: int
    size: TrainingBytes
    placement: str
    kernel: str
    ranks: int


@dataclass(frozen=True)
class RankEstimate:
    """One rank's part of the tables.

    Attributes:
        size: of its part. work: its share of the time that the planner expects all ranks to spend on tables.
        hbm, ddr: bytes of GPU and main memory, with the buffers of a batch and the copy that a checkpoint is written from.
    """

    rank: int
    size: TrainingBytes
    work: float
    hbm: int
    ddr: int


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers.

    Attributes:
        tables: the largest first. ranks: those that share one replica of the tables.
        dense: of each rank's part of everything but the tables. buffers: bytes of its activations and communication.
        replicas: of the tables, one in each group of ranks. sync_every: steps between their averages.
        cached: share of the rows of each table with fused_uvm_caching that is on a GPU at a time.
    """

    tables: list[TableEstimate]
    ranks: list[RankEstimate]
    dense: TrainingBytes
    replicas: int = 1
    buffers: int = 0
    sync_every: int = 1
    cached: float | None = None

    def lines(self) -> list[str]:
        """Two small tables; many tables or ranks are summarised."""
        right = ("left", *["right"] * 4, "left", "left", "right")
        head = ["table", "rows", "dim", "weights", "optimiser", "placement", "kernel", "ranks"]
        lines = _plain(head, self._table_cells(), right)
        head = ["rank", "tables", "optimiser", "gradients", "dense part", "of bytes", "of work"]
        lines += _plain(head, self._rank_cells(), ("left", *["right"] * 6))
        lines += [f"fused_uvm_caching: {self.cached:.0%} of the rows are cached on the GPUs"] if self.cached else []
        return [*lines, f"{self.replicas} replicas, each on {len(self.ranks)} ranks"] if self.replicas > 1 else lines

    def costly_averages(self) -> str | None:
        """A warning with the bytes that averages of the replicas send where each step has one and they are many; else None."""
        share = 2 * (self.replicas - 1) / self.replicas  # an all-reduce, of weights and the optimiser's state
        sent = [int(share * (rank.size.weights + rank.size.state)) for rank in self.ranks]
        if self.sync_every > 1 or max(sent) < LARGE:
            return None
        return (
            f"train.sync_every=1 averages the tables of {self.replicas} replicas after each step: up to {readable(max(sent))} "
            f"sent by a rank and {readable(sum(sent) * self.replicas)} by all. A larger train.sync_every divides that."
        )

    def _table_cells(self) -> list[list[str]]:
        shown = self.tables if len(self.tables) <= TABLES else self.tables[: TABLES - 2]
        cells = [
            [t.name, f"{t.rows:,}", str(t.dim), *_bytes(t.size), t.placement, t.kernel, str(t.ranks)] for t in shown
        ]
        if rest := self.tables[len(shown) :]:
            rows = sum(t.rows for t in rest)
            cells.append([f"{len(rest)} smaller", f"{rows:,}", "", *_bytes(total(t.size for t in rest)), "", "", ""])
        return cells

    def _rank_cells(self) -> list[list[str]]:
        """Of each rank; of many ranks the minimum, median and maximum of each column, and the peak rank."""
        everything, dense = total(r.size for r in self.ranks).total or 1, readable(self.dense.total)
        columns = ("weights", "state", "gradients")

        def cells(name: str, numbers: Sequence[int], work: float, whole: int) -> list[str]:
            return [name, *map(readable, numbers), dense, f"{whole / everything:.1%}", f"{work:.1%}"]

        if len(self.ranks) <= RANKS:
            return [cells(str(r.rank), [getattr(r.size, c) for c in columns], r.work, r.size.total) for r in self.ranks]
        by_size = [sorted(getattr(r.size, c) for r in self.ranks) for c in (*columns, "total")]
        by_work, peak = sorted(r.work for r in self.ranks), self.peak
        found = []
        for name, place in (("min", 0), ("median", len(self.ranks) // 2), ("max", -1)):
            *numbers, whole = (values[place] for values in by_size)
            found.append(cells(name, numbers, by_work[place], whole))
        numbers = [getattr(peak.size, c) for c in columns]
        return [*found, cells(f"peak: {peak.rank}", numbers, peak.work, peak.size.total)]

    @property
    def peak(self) -> RankEstimate:
        """The rank with the most bytes of tables."""
        return max(self.ranks, key=lambda rank: (rank.size.total, rank.hbm, rank.ddr))


class PlanRecorder(Stats):
    """Records the options that the planner chose, through its interface for reports."""

    options: Sequence[ShardingOption] = ()

    def log(self, *_: Any, best_plan: Sequence[ShardingOption], **__: Any) -> None:
        """Called by the planner at its end."""
        self.options = best_plan


def estimate(
    options: Sequence[ShardingOption],
    ranks: int,
    optimizer: FusedOptimizer,
    dense: TrainingBytes,
    replicas: int,
    buffers: int = 0,
    sync_every: int = 1,
) -> Estimate:
    """Adds a plan's shards up.

    Args:
        options: one a table, as the planner chose it. ranks: of one replica. optimizer: of the tables.
    """
    parts: list[list[tuple[ShardingOption, Shard]]] = [[] for _ in range(ranks)]
    for option in options:
        for shard in option.shards:
            parts[shard.rank or 0].append((option, shard))
    work = [sum(shard.perf.total for _, shard in part if shard.perf) for part in parts]
    whole = sum(work) or 1.0
    found = []
    for rank, part in enumerate(parts):
        part_size = total(shard_bytes(option, shard, optimizer) for option, shard in part)
        storages = [shard.storage for _, shard in part if shard.storage]
        hbm, ddr = sum(s.hbm for s in storages), sum(s.ddr for s in storages)
        found.append(RankEstimate(rank, part_size, work[rank] / whole, hbm, ddr))
    tables = sorted((_table(option, optimizer) for option in options), key=lambda t: (-t.size.total, t.name))
    return Estimate(tables, found, dense, replicas, buffers, sync_every)


def _table(option: ShardingOption, optimizer: FusedOptimizer) -> TableEstimate:
    sizes = [shard_bytes(option, shard, optimizer) for shard in option.shards]
    rows, dim = option.tensor.shape
    size = sizes[0] if replicated(option) else total(sizes)
    ranks = len({shard.rank for shard in option.shards})
    return TableEstimate(option.name, rows, dim, size, option.sharding_type, option.compute_kernel, ranks)


def shard_bytes(option: ShardingOption, shard: Shard, optimizer: FusedOptimizer) -> TrainingBytes:
    """Bytes of a part of a table. A fused optimiser keeps no gradients; that of a replicated table is as large as it."""
    rows, columns = shard.size
    weights = rows * columns * option.tensor.element_size()
    return TrainingBytes(weights, weights if replicated(option) else 0, optimizer.state_bytes(rows, columns))


def checkpoint_copy_bytes(size: TrainingBytes, settings: Settings) -> int:
    """Bytes of main memory that a checkpoint is copied to before it is written, also from a GPU."""
    return size.weights + size.state if settings.checkpoint_async else 0


def replicated(option: ShardingOption) -> bool:
    """Whether every rank has the whole table."""
    return option.sharding_type == ShardingType.DATA_PARALLEL.value


def dense_bytes(model: nn.Module, kinds: tuple[type, ...], settings: Settings, ranks: int) -> TrainingBytes:
    """Bytes of a rank's part of all but the tables, which are in the modules of `kinds`."""
    tables = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
    others = [p for name, p in model.named_parameters() if not tables or not name.startswith(tables)]
    weights = sum(p.numel() * p.element_size() for p in others)
    trained = sum(p.numel() * p.element_size() for p in others if p.requires_grad)
    parts = ranks if settings.dense_parallel == "fsdp" else 1
    return TrainingBytes(weights // parts, trained // parts, trained * DENSE_STATE[settings.dense.name] // parts)


def _bytes(size: TrainingBytes) -> list[str]:
    return [readable(size.weights), readable(size.state)]


def _plain(head: list[str], cells: list[list[str]], alignment: tuple[str, ...]) -> list[str]:
    return tabulate(cells, head, "plain", disable_numparse=True, colalign=alignment).splitlines()


def total(sizes: Iterable[TrainingBytes]) -> TrainingBytes:
    """Their sum."""
    return sum(sizes, TrainingBytes())


def readable(count: int) -> str:
    """A number of bytes with a unit, as 53.3 GB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"
