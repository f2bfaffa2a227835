"""Every distinct prediction of a binary task with its weights: what exact AUC, log loss and ECE are computed from."""

# Shapes: B rows, T tasks, N rows of one task, G distinct predictions of one task.

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import Self

from pipeline.evaluation.metrics.base import Rows, Tasks

# Cells (one row of one binary task) that wait to be sorted into the tables, or as many as the tables have once that is
# more: a cell is then sorted O(log cells) times.
COMPACT_CELLS = 1 << 20


@dataclass(frozen=True)
class PredictionTable:
    """One binary task. A soft label y in [0, 1] is a positive row of weight y·w and a negative row of weight (1 - y)·w.

    Attributes:
        logit_G: distinct and ascending; all that is not finite is one of +inf. positive_G, negative_G: weight of each class.
    """

    logit_G: Tensor
    positive_G: Tensor
    negative_G: Tensor

    @cached_property
    def positive(self) -> float:
        """Weight of the positive class."""
        return float(self.positive_G.sum())

    @cached_property
    def negative(self) -> float:
        """Weight of the negative class."""
        return float(self.negative_G.sum())

    @property
    def weight(self) -> float:
        """Weight of both classes."""
        return self.positive + self.negative

    @cached_property
    def finite(self) -> bool:
        """There are rows, and every prediction is finite: without that, nothing that depends on predictions is defined."""
        return bool(self.weight) and bool(self.logit_G[-1].isfinite())

    @cached_property
    def loss(self) -> float:
        """Log loss in nats, summed over the weight."""
        # Not softplus: torch's is linear above 20, an error of 2e-9.
        return -float(self.positive_G @ logsigmoid(self.logit_G) + self.negative_G @ logsigmoid(-self.logit_G))

    @cached_property
    def predicted_G(self) -> Tensor:  # noqa: N802
        """Predicted probability times weight."""
        return self.logit_G.sigmoid() * (self.positive_G + self.negative_G)


class PredictionTables:
    """`PredictionTable` of each binary task.

    Memory: 24 bytes for each distinct prediction (logit and the weights of both classes). float32 logits hardly ever
    repeat, so plan 24 bytes per observed row and binary task on the rank that merges (2.4 GB per 100 million), and 100 at
    the peak, while one task's table is sorted. bfloat16 logits have at most 65,536 values and stay below 2 MB.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.columns = {t: name for t, (name, kind) in enumerate(tasks) if kind == "binary"}
        self.tables_3G = {t: torch.zeros(3, 0, dtype=torch.float64) for t in self.columns}
        self.pending_3BT: list[Tensor] = []
        self.pending_cells = 0

    def update(self, rows: Rows) -> None:
        """Adds B rows."""
        if not self.columns:
            return
        z_BT, y_BT, w_BT = rows.logit_BT, rows.label_BT, rows.weight_BT
        # All that is not finite is one prediction: it keeps its weight in the base rate without growing the table.
        # Rows that do not count stay as well, all at logit 0 and of weight 0.
        rows_3BT = torch.stack((torch.where(z_BT.isfinite(), z_BT, math.inf), w_BT * y_BT, w_BT * (1 - y_BT)))
        self.pending_3BT.append(rows_3BT[..., list(self.columns)])
        self.pending_cells += len(y_BT) * len(self.columns)
        if self.pending_cells >= max(COMPACT_CELLS, sum(x_3G.shape[1] for x_3G in self.tables_3G.values())):
            self._compact()

    def merge(self, other: Self) -> Self:
        """The tables of the rows of both."""
        both = type(self)(())
        both.columns = self.columns
        a, b = self._compact(), other._compact()
        both.tables_3G = {t: _distinct(torch.cat((a[t], b[t]), dim=1)) for t in self.columns}
        return both

    def state(self) -> dict[str, Tensor]:
        """One (3, G) table a binary task."""
        return {f"table/{self.columns[t]}": x_3G for t, x_3G in self._compact().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Replaces the tables."""
        self.tables_3G = {t: state[f"table/{name}"] for t, name in self.columns.items()}
        self.pending_3BT, self.pending_cells = [], 0

    def of_task(self, t: int) -> PredictionTable:
        """The table of one binary task."""
        return PredictionTable(*self._compact()[t])

    def _compact(self) -> dict[int, Tensor]:
        """The tables, after sorting what is pending into them."""
        if self.pending_3BT:
            for column, t in enumerate(self.columns):
                pending = [rows_3BT[..., column] for rows_3BT in self.pending_3BT]
                self.tables_3G[t] = _distinct(torch.cat([self.tables_3G[t], *pending], dim=1))
            self.pending_3BT, self.pending_cells = [], 0
        return self.tables_3G


def _distinct(rows_3N: Tensor) -> Tensor:
    """Rows (logit, positive weight, negative weight) sorted by logit, equal logits added up: (3, N) -> (3, G)."""
    logit_G, group_N = rows_3N[0].unique(return_inverse=True)
    weight_2G = rows_3N.new_zeros(2, len(logit_G)).scatter_add_(1, group_N.expand(2, -1), rows_3N[1:])
    return torch.cat((logit_G.unsqueeze(0), weight_2G))
