"""What a metric is: a function of a mergeable statistic of the rows."""

# Shapes: B rows, T tasks.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import Self

Tasks = Sequence[tuple[str, str]]  # (name, kind) in the order of the tensors' columns


@dataclass(frozen=True)
class Rows:
    """B rows as statistics get them: float64 on the CPU, checked, and 0 wherever `counts_BT` is false.

    Attributes:
        logit_BT: logit of a binary task, prediction of a regression; may be NaN or infinite.
        counts_BT: observed and of weight above 0.
    """

    logit_BT: Tensor
    label_BT: Tensor
    weight_BT: Tensor
    counts_BT: Tensor


class Statistic(Protocol):
    """A sufficient statistic of all tasks, from which any number of metrics is computed.

    Statistics of shards of the same rows, merged in any order, are equal up to the rounding of float64 sums.
    """

    def __init__(self, tasks: Tasks) -> None: ...

    def update(self, rows: Rows) -> None:
        """Adds B rows."""

    def merge(self, other: Self) -> Self:
        """The statistic of the rows of both; neither is changed."""

    def state(self) -> dict[str, Tensor]:
        """All of it as float64 tensors on the CPU: not copied, never changed by later updates, not to be written into."""

    def load(self, state: dict[str, Tensor]) -> None:
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
        compute: its value, from the statistic's `of_task`. None where it is undefined; so is a result that is not finite.
        higher_is_better: None where neither direction is better.
        label: its name in tables.
    """

    name: str
    kind: str
    statistic: type[Statistic]
    compute: Callable[[Any], float | int | None]
    higher_is_better: bool | None = None
    label: str = ""
