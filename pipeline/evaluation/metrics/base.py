"""What a metric is: a function of a mergeable statistic of the rows, for every slice and without every bucket."""

# Shapes: B rows, T tasks, D dimensions of slices, S slices, K buckets.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from typing_extensions import Self

Tasks = Sequence[tuple[str, str]]  # (name, kind) in the order of the tensors' columns


@dataclass(frozen=True)
class Grouping:
    """How rows are grouped.

    Attributes:
        slices: of each dimension the names of its slices; a row is in one of them or in none. Slice 0 is all rows, those of the
            first dimension follow.
        buckets: K; rows are put into them by the hash of their cluster. With 1 there are no intervals.
        ndcg: k of NDCG@k. grouped: whether rows have groups; without, what ranks within groups is undefined.
        train_rates: base rate of each binary task in training, where it is known.
        halvings: of the clusters whose rows are kept for ranking metrics. Where there are some, these metrics and their
            intervals are of a sample of clusters, except AUC, PR-AUC and ECE of the whole split: of all rows, with logits
            rounded to a grid.
    """

    slices: tuple[tuple[str, ...], ...] = ()
    buckets: int = 1
    ndcg: int = 10
    grouped: bool = True
    train_rates: Mapping[str, float] = field(default_factory=dict)
    halvings: int = 0

    @property
    def count(self) -> int:
        """S, the slice of all rows among them."""
        return 1 + sum(map(len, self.slices))

    @property
    def kept(self) -> float:
        """The share of the clusters whose rows are kept."""
        return 0.5**self.halvings

    @property
    def starts(self) -> list[int]:
        """The first slice of each dimension."""
        return [1 + sum(map(len, self.slices[:d])) for d in range(len(self.slices))]


@dataclass(frozen=True)
class Rows:
    """B rows as statistics get them: float64 on the CPU, checked, and 0 wherever `counts_BT` is false.

    Attributes:
        logit_BT: logit of a binary task, prediction of a regression; may be NaN or infinite.
        counts_BT: observed and of weight above 0.
        cluster_B: uint32, hash of the row's cluster. group_B: int64, its group; those of one number are one group.
        slice_BD: int16, place of its slice among those of the dimension, -1 for none.
        dtype: float32 where that holds logits, labels and weights exactly.
    """

    logit_BT: Tensor
    label_BT: Tensor
    weight_BT: Tensor
    counts_BT: Tensor
    cluster_B: np.ndarray
    group_B: np.ndarray
    slice_BD: np.ndarray
    dtype: type[np.floating[Any]] = np.float64


@dataclass(frozen=True)
class Figure:
    """One metric of one task: its value in each slice, and without each bucket; NaN where it is undefined.

    GAUC, NDCG and XAUC are of all rows, and undefined in other slices.

    Attributes:
        left_out_SK: None for a metric without intervals.
    """

    value_S: np.ndarray
    left_out_SK: np.ndarray | None = None


class Statistic(Protocol):
    """A sufficient statistic of all tasks, from which any number of metrics is computed.

    Statistics of shards of the same rows, merged in any order, are equal up to the rounding of float64 sums.
    """

    def __init__(self, tasks: Tasks, grouping: Grouping) -> None: ...

    def update(self, rows: Rows) -> None:
        """Adds B rows."""

    def merge(self, other: Self) -> Self:
        """The statistic of the rows of both; neither is changed."""

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays: not copied, never changed by later updates, not to be written into."""

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Replaces all of it by what `state()` returned; other keys are ignored."""

    def of_task(self, t: int) -> Any:
        """What the metrics of task `t` are computed from."""


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: its key in eval.jsonl.
        kind: of the tasks that have it, binary or regression.
        statistic: what it is computed from; metrics that name the same one share it.
        compute: its values, from the statistic's `of_task`. NaN where it is undefined.
        higher_is_better: None where neither direction is better.
        label: its name in tables.
    """

    name: str
    kind: str
    statistic: type[Statistic]
    compute: Callable[[Any], Figure]
    higher_is_better: bool | None = None
    label: str = ""


def bucket_of(cluster_B: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of clusters by their uint32 hash: which of K equal ranges it is in."""
    return (cluster_B.astype(np.uint64) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)
