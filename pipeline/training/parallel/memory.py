"""What a sharding plan comes to: bytes and expected work, by table and by rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn
from torchrec.distributed.planner.types import Shard, ShardingOption, Stats
from torchrec.distributed.types import ShardingType

from pipeline.training.config import Settings

FLOAT = 4  # bytes
TABLES, RANKS = 8, 4  # more of them than that are summed up
DENSE_STATE = {"adam": 2, "adamw": 2, "adagrad": 1}  # numbers for each parameter


@dataclass(frozen=True)
class Load:
    """Bytes that something takes while it is trained: weights, gradients that are kept, the optimiser's state."""

    weights: int = 0
    gradients: int = 0
    state: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.state

    def __add__(self, other: "Load") -> "Load":
        return Load(self.weights + other.weights, self.gradients + other.gradients, self.state + other.state)


@dataclass(frozen=True)
class TableEstimate:
    """One table: its size, where it goes, and the bytes of one copy; ranks: how many hold a part of it."""

    name: str
    rows: int
    dim: int
    load: Load
    placement: str
    kernel: str
    ranks: int


@dataclass(frozen=True)
class RankEstimate:
    """What one rank holds of the tables.

    Attributes:
        work: its share of the time that the planner expects all ranks to spend on tables.
        hbm, ddr: bytes of GPU and main memory, with what a batch needs on its way through the tables.
    """

    rank: int
    load: Load
    work: float
    hbm: int
    ddr: int


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers.

    Attributes:
        tables: the largest first. ranks: those that share one copy of the tables.
        dense: what each rank has beside the tables.
        copies: of the tables, in groups of ranks.
    """

    tables: list[TableEstimate]
    ranks: list[RankEstimate]
    dense: Load
    copies: int = 1

    def lines(self) -> list[str]:
        """Two small tables; many tables or ranks are summed up."""
        right = ("left", *["right"] * 4, "left", "left", "right")
        head = ["table", "rows", "dim", "weights", "optimiser", "placement", "kernel", "ranks"]
        lines = _plain(head, self._table_cells(), right)
        head = ["rank", "tables", "optimiser", "gradients", "dense part", "of bytes", "of work"]
        lines += _plain(head, self._rank_cells(), ("left", *["right"] * 6))
        return [*lines, f"{self.copies} copies of this, each on {len(self.ranks)} ranks"] if self.copies > 1 else lines

    def _table_cells(self) -> list[list[str]]:
        shown = self.tables if len(self.tables) <= TABLES else self.tables[: TABLES - 2]
        cells = [
            [t.name, f"{t.rows:,}", str(t.dim), size(t.load.weights), size(t.load.state), t.placement, t.kernel, str(t.ranks)]
            for t in shown
        ]  # fmt: skip
        if rest := self.tables[len(shown) :]:
            load, rows = total(t.load for t in rest), sum(t.rows for t in rest)
            cells.append([f"{len(rest)} smaller", f"{rows:,}", "", size(load.weights), size(load.state), "", "", ""])
        return cells

    def _rank_cells(self) -> list[list[str]]:
        """Of each rank, or of the least, the middle and the most in each column and of the fullest."""
        everything, dense = total(r.load for r in self.ranks).total or 1, size(self.dense.total)
        columns = ("weights", "state", "gradients")

        def cells(name: str, numbers: Sequence[int], work: float, whole: int) -> list[str]:
            return [name, *map(size, numbers), dense, f"{whole / everything:.1%}", f"{work:.1%}"]

        if len(self.ranks) <= RANKS:
            return [cells(str(r.rank), [getattr(r.load, c) for c in columns], r.work, r.load.total) for r in self.ranks]
        by_load = [sorted(getattr(r.load, c) for r in self.ranks) for c in (*columns, "total")]
        by_work, fullest = sorted(r.work for r in self.ranks), self.fullest
        found = []
        for name, place in (("least", 0), ("median", len(self.ranks) // 2), ("most", -1)):
            *numbers, whole = (values[place] for values in by_load)
            found.append(cells(name, numbers, by_work[place], whole))
        numbers = [getattr(fullest.load, c) for c in columns]
        return [*found, cells(f"fullest: {fullest.rank}", numbers, fullest.work, fullest.load.total)]

    @property
    def fullest(self) -> RankEstimate:
        """The rank that holds the most."""
        return max(self.ranks, key=lambda rank: (rank.load.total, rank.hbm, rank.ddr))


class Chosen(Stats):
    """Keeps what the planner chose: of TorchRec's interface for what reports on a plan."""

    options: Sequence[ShardingOption] = ()

    def log(self, *_: Any, best_plan: Sequence[ShardingOption], **__: Any) -> None:
        """Called by the planner at its end."""
        self.options = best_plan


def estimate(options: Sequence[ShardingOption], ranks: int, optimizer: str, dense: Load, copies: int) -> Estimate:
    """Adds a plan's shards up.

    Args:
        options: one a table, as the planner chose it. ranks: of one copy. optimizer: of the tables.
    """
    parts: list[list[tuple[ShardingOption, Shard]]] = [[] for _ in range(ranks)]
    for option in options:
        for shard in option.shards:
            parts[shard.rank or 0].append((option, shard))
    work = [sum(shard.perf.total for _, shard in part if shard.perf) for part in parts]
    whole = sum(work) or 1.0
    found = []
    for rank, part in enumerate(parts):
        load = total(shard_load(option, shard, optimizer) for option, shard in part)
        storages = [shard.storage for _, shard in part if shard.storage]
        hbm, ddr = sum(s.hbm for s in storages), sum(s.ddr for s in storages)
        found.append(RankEstimate(rank, load, work[rank] / whole, hbm, ddr))
    tables = sorted((_table(option, optimizer) for option in options), key=lambda t: (-t.load.total, t.name))
    return Estimate(tables, found, dense, copies)


def _table(option: ShardingOption, optimizer: str) -> TableEstimate:
    loads = [shard_load(option, shard, optimizer) for shard in option.shards]
    holders = {shard.rank for shard, load in zip(option.shards, loads, strict=True) if load.weights}
    rows, dim = option.tensor.shape
    load = loads[0] if replicated(option) else total(loads)
    return TableEstimate(option.name, rows, dim, load, option.sharding_type, option.compute_kernel, len(holders))


def shard_load(option: ShardingOption, shard: Shard, optimizer: str) -> Load:
    """Bytes of a part of a table. A fused optimiser keeps no gradients; that of a replicated table is as large as it."""
    rows, columns = shard.size
    weights = rows * columns * option.tensor.element_size()
    return Load(weights, weights if replicated(option) else 0, table_state(optimizer, rows, columns))


def table_state(optimizer: str, rows: int, columns: int) -> int:
    """Bytes of a table optimiser's state."""
    numbers = {"rowwise_adagrad": rows, "adagrad": rows * columns, "sgd": 0, "adam": 2 * rows * columns}
    return FLOAT * numbers[optimizer]


def replicated(option: ShardingOption) -> bool:
    """Whether every rank has the whole table."""
    return option.sharding_type == ShardingType.DATA_PARALLEL.value


def dense_load(model: nn.Module, kinds: tuple[type, ...], settings: Settings, ranks: int) -> Load:
    """Bytes of a rank's part of all but the tables, which are in the modules of `kinds`."""
    tables = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
    others = [p for name, p in model.named_parameters() if not tables or not name.startswith(tables)]
    weights = sum(p.numel() * p.element_size() for p in others)
    trained = sum(p.numel() * p.element_size() for p in others if p.requires_grad)
    parts = ranks if settings.dense_parallel == "fsdp" else 1
    return Load(weights // parts, trained // parts, trained * DENSE_STATE[settings.dense.name] // parts)


def _plain(head: list[str], cells: list[list[str]], alignment: tuple[str, ...]) -> list[str]:
    return tabulate(cells, head, "plain", disable_numparse=True, colalign=alignment).splitlines()


def total(loads: Iterable[Load]) -> Load:
    """Their sum."""
    return sum(loads, Load())


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"
