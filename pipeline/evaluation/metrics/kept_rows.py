"""The rows that ranking metrics are computed from: all of them, or where memory is short a sample of their clusters.

The clusters are halved by their hash as often as the grouping says. AUC, PR-AUC and ECE of the whole split are then those of
all rows with logits on a grid (`LogitGrid`), with the sample's standard error scaled to all clusters. GAUC, NDCG, XAUC and
the ranking metrics of slices are those of the sample.
"""

# Shapes: B rows of a batch, N rows, I predictions that are not finite, T tasks, D dimensions, S slices, K buckets.

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from typing_extensions import Self

from pipeline.evaluation.metrics.base import Figure, Grouping, Rows, Tasks, bucket_of
from pipeline.evaluation.metrics.grouped import grouped
from pipeline.evaluation.metrics.logit_grid import LogitGrid
from pipeline.evaluation.metrics.radix import ascending
from pipeline.evaluation.metrics.ranking import RankedRows
from pipeline.evaluation.metrics.slice_ranking import Figures, binned, figures_of_slices
from pipeline.evaluation.metrics.xauc import xauc

NAMES = ("cluster", "group", "slices", "logit", "label", "weight")  # of the arrays of a part
CLUSTER, GROUP, SLICES, LOGIT, LABEL, WEIGHT = range(6)
MOST_HALVINGS = 31


def bytes_of_row(tasks: int, dimensions: int) -> int:
    """What a kept row takes in float32."""
    return 12 + 2 * dimensions + 12 * tasks


def halvings_of(rows: float, bytes_of_each: int, limit: float) -> int:
    """How often clusters must be halved so that the rows of those that are left take no more than a limit of bytes."""
    return math.ceil(math.log2(min(max(rows * bytes_of_each / limit, 1), 1 << MOST_HALVINGS)))


class KeptRows:
    """`TaskRows` of all tasks.

    Memory: `bytes_of_row` of each row that is kept; in float64 12 bytes a task more.
    """

    def __init__(self, tasks: Tasks, grouping: Grouping) -> None:
        self.tasks, self.grouping = tuple(tasks), grouping
        self.parts: list[tuple[np.ndarray, ...]] = []
        binary = [t for t, (_, kind) in enumerate(self.tasks) if kind == "binary"]
        self.grids = {t: LogitGrid() for t in binary if grouping.halvings}
        self.non_finite_TS = np.zeros((len(self.tasks), grouping.count), np.int64)  # predictions of all rows that count

    def update(self, rows: Rows) -> None:
        """Adds B rows."""
        label_BT = rows.label_BT.where(rows.counts_BT, math.nan)
        of_tasks = (x_BT.numpy().astype(rows.dtype) for x_BT in (rows.logit_BT, label_BT, rows.weight_BT))
        part: tuple[np.ndarray, ...] = (rows.cluster_B, rows.group_B, rows.slice_BD, *of_tasks)
        if not (counts_B := rows.counts_BT.any(1).numpy()).all():
            part = tuple(x[counts_B] for x in part)
        self._count_non_finite(part)
        for t, grid in self.grids.items():
            grid.add(*_classes(part, t))
        self.parts.append(_sampled(part, self.grouping.halvings))

    def _count_non_finite(self, part: tuple[np.ndarray, ...]) -> None:
        row_I, task_I = np.nonzero(~np.isfinite(part[LOGIT]))
        self.non_finite_TS[:, 0] += np.bincount(task_I, minlength=len(self.tasks))
        for d, start in enumerate(self.grouping.starts):
            slice_I = part[SLICES][row_I, d]
            np.add.at(self.non_finite_TS, (task_I[slice_I >= 0], start + slice_I[slice_I >= 0]), 1)

    def merge(self, other: Self) -> Self:
        """The rows of both."""
        both = type(self)(self.tasks, self.grouping)
        both.non_finite_TS = self.non_finite_TS + other.non_finite_TS
        both.parts = self.parts + other.parts
        for t, grid in both.grids.items():
            for source in (self, other):
                grid.merge(source.grids[t])
        return both

    def state(self) -> dict[str, np.ndarray]:
        """The rows, and what stands in for those that were left out."""
        state = {f"rows/{name}": x for name, x in zip(NAMES, self._columns, strict=True)}
        state["rows/non_finite"] = self.non_finite_TS.copy()
        return state | {f"grid/{t}": grid.table() for t, grid in self.grids.items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Replaces the rows."""
        self.parts = [tuple(state[f"rows/{name}"] for name in NAMES)]
        self.non_finite_TS = state["rows/non_finite"].copy()
        self.grids = {t: LogitGrid(state[f"grid/{t}"]) for t in self.grids}

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        """All parts as one."""
        self.parts = [part for part in self.parts if len(part[CLUSTER])]  # an empty one has no precision
        if not self.parts:
            count, dimensions = len(self.tasks), len(self.grouping.slices)
            wide = np.zeros((0, count))
            return np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros((0, dimensions), np.int16), wide, wide, wide
        if len(self.parts) > 1:
            self.parts = [tuple(np.concatenate(columns) for columns in zip(*self.parts, strict=True))]
        return self.parts[0]

    def of_task(self, t: int) -> "TaskRows":
        """The rows of one task that count."""
        cluster_N, group_N, slice_ND, *of_tasks = self._columns
        logit_N, label_N, weight_N = (np.ascontiguousarray(x_NT[:, t]) for x_NT in of_tasks)
        slice_DN = np.ascontiguousarray(slice_ND.T)
        kept_N = np.flatnonzero(~np.isnan(label_N))
        if len(kept_N) < len(label_N):
            cluster_N, group_N, logit_N, label_N, weight_N = (
                x_N[kept_N] for x_N in (cluster_N, group_N, logit_N, label_N, weight_N)
            )
            slice_DN = slice_DN[:, kept_N]
        return TaskRows(
            self.grouping, bucket_of(cluster_N, self.grouping.buckets), group_N, slice_DN, logit_N, label_N, weight_N,
            self.non_finite_TS[t] > 0, self.grids[t].table() if t in self.grids else None,
        )  # fmt: skip


@dataclass(frozen=True)
class TaskRows:
    """One task's rows that count; those of a share of clusters where memory was short, and then all rows' table.

    Attributes:
        unknown_S: slices with a prediction, of all rows, that is not finite: nothing that depends on predictions is defined
            there.
        table_3G: logits on a grid, ascending, and weights of both classes; None where all rows are here.
    """

    grouping: Grouping
    bucket_N: np.ndarray
    group_N: np.ndarray
    slice_DN: np.ndarray
    logit_N: np.ndarray
    label_N: np.ndarray
    weight_N: np.ndarray
    unknown_S: np.ndarray
    table_3G: np.ndarray | None

    @cached_property
    def order_N(self) -> np.ndarray:  # noqa: N802
        """Of the rows with finite predictions, by ascending prediction."""
        order_N = ascending(self.logit_N)
        return order_N[np.isfinite(self.logit_N[order_N])]

    @cached_property
    def ranked(self) -> RankedRows:
        """The rows in that order."""
        order_N = self.order_N
        logit_N, label_N, weight_N = (
            x_N[order_N].astype(np.float64) for x_N in (self.logit_N, self.label_N, self.weight_N)
        )
        classes = (weight_N * label_N, weight_N * (1 - label_N))
        return _ranked(logit_N, *classes, self.bucket_N[order_N], self.grouping.buckets)

    @cached_property
    def table(self) -> RankedRows | None:
        """All rows' logits on the grid, where only a share of the rows is here."""
        if self.table_3G is None:
            return None
        logit_G, positive_G, negative_G = self.table_3G
        return _ranked(logit_G, positive_G, negative_G, np.zeros(len(logit_G), np.int64), 1)

    @cached_property
    def of_slices(self) -> list[Figures]:
        """Of each dimension the ranking figures of its slices."""
        if not self.grouping.slices:
            return []
        rows = binned(self.ranked, self.order_N, len(self.logit_N))
        return [figures_of_slices(rows, self.slice_DN[d], len(names)) for d, names in enumerate(self.grouping.slices)]

    @cached_property
    def in_groups(self) -> dict[str, tuple[float, np.ndarray]]:
        """GAUC and NDCG@k of all rows; NaN where each is a group of its own."""
        if not self.grouping.grouped:
            return dict.fromkeys(("gauc", "ndcg"), (math.nan, np.full(self.grouping.buckets, math.nan)))
        rows = (self.logit_N, self.label_N, self.weight_N, self.group_N, self.bucket_N)
        return grouped(*rows, self.grouping.buckets, self.grouping.ndcg)

    @cached_property
    def in_order(self) -> tuple[float, np.ndarray]:
        """XAUC of all rows of a regression."""
        return xauc(self.logit_N, self.label_N, self.weight_N, self.bucket_N, self.grouping.buckets)

    def whole_only(self, value: float, left_out_K: np.ndarray | None) -> Figure:
        """A figure of the slice of all rows alone, value and standard error of those that are here."""
        value_S = np.full(self.grouping.count, np.nan)
        value_S[0] = value
        if left_out_K is None or self.grouping.buckets == 1:
            return Figure(np.where(self.unknown_S, np.nan, value_S))
        left_out_SK = np.full((self.grouping.count, self.grouping.buckets), np.nan)
        left_out_SK[0] = left_out_K
        return self._known(Figure(value_S, left_out_SK))

    def figure(self, name: str, metric: Callable[[RankedRows], tuple[float, np.ndarray]]) -> Figure:
        """A ranking metric of all rows and of every slice.

        Args:
            name: in `figures_of_slices`. metric: of all rows, one of pipeline.evaluation.metrics.ranking.
        """
        whole, left_K = metric(self.ranked)
        value_S = np.concatenate([np.array([whole]), *(figures[name][0] for figures in self.of_slices)])
        if self.grouping.buckets == 1:
            left_SK = None
        else:
            left_SK = self._scaled(value_S, np.concatenate([left_K[None], *(f[name][1] for f in self.of_slices)]))
        if self.table is not None:
            value_S[0] = metric(self.table)[0]
            if left_SK is not None:
                left_SK[0] += value_S[0] - whole
        return self._known(Figure(value_S, left_SK))

    def _scaled(self, value_S: np.ndarray, left_out_SK: np.ndarray) -> np.ndarray:
        """Values without a bucket as if all clusters were here: the standard error of the whole split is that much smaller."""
        shrunk = left_out_SK.copy()
        shrunk[0] = value_S[0] + math.sqrt(self.grouping.kept) * (left_out_SK[0] - value_S[0])
        return shrunk

    def _known(self, figure: Figure) -> Figure:
        value_S = np.where(self.unknown_S, np.nan, figure.value_S)
        left_SK = None if figure.left_out_SK is None else np.where(self.unknown_S[:, None], np.nan, figure.left_out_SK)
        return Figure(value_S, left_SK)

    @property
    def auc_error(self) -> float:
        """Bound on the error of the whole split's AUC that the grid makes: half of the pairs that share a logit on it."""
        if self.table_3G is None:
            return 0.0
        _, positive_G, negative_G = self.table_3G
        pairs = positive_G.sum() * negative_G.sum()
        return float(positive_G @ negative_G / 2 / pairs) if pairs else 0.0


def _ranked(
    logit_N: np.ndarray, positive_N: np.ndarray, negative_N: np.ndarray, bucket_N: np.ndarray, buckets: int
) -> RankedRows:
    """Rows that are sorted by logit."""
    tie_N = np.cumsum(np.diff(logit_N, prepend=logit_N[:1]) > 0, dtype=np.int32)
    with np.errstate(over="ignore"):
        predicted_N = (positive_N + negative_N) / (1 + np.exp(-logit_N))
    return RankedRows(tie_N, positive_N, negative_N, predicted_N, bucket_N, buckets)


def _classes(part: tuple[np.ndarray, ...], t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logit and weight of both classes of the rows of a task that count."""
    kept_N = ~np.isnan(part[LABEL][:, t])
    logit_N, label_N, weight_N = (part[x][kept_N, t].astype(np.float64) for x in (LOGIT, LABEL, WEIGHT))
    return logit_N, weight_N * label_N, weight_N * (1 - label_N)


def _sampled(part: tuple[np.ndarray, ...], halvings: int) -> tuple[np.ndarray, ...]:
    """The rows of the clusters that are left after so many halvings: by the low bits of the hash; buckets are by the high."""
    if not halvings:
        return part
    kept_N = part[CLUSTER] & np.uint32((1 << halvings) - 1) == 0
    return tuple(x[kept_N] for x in part)
