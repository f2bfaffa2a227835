"""How a gated model mixes its experts: the mean gate weights of each level."""

# Shapes: B rows, U units (tasks at the last level), E experts.

from collections import deque
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from features.batch import Batch
from models.fusion.fusion import Fusion
from pipeline.evaluation.lockstep import to_first

ROWS = (
    1 << 14
)  # that are averaged, on each rank: of weights in [0, 1] a standard error of 0.004, were they drawn at random


class ExpertWeights:
    """Mean gate weights over the first rows of a split, without padding: a context around the ranker's forward passes.

    Args:
        fusion: of the ranker.
    """

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion
        self.rows = 0
        self.sums: list[Tensor] = []
        self.inputs: deque[Any] = deque()  # of batches that the fusion was run on and that `update` has not had

    def __enter__(self) -> "ExpertWeights":
        self.hook = self.fusion.register_forward_pre_hook(self._keep_input)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hook.remove()

    def _keep_input(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.rows < ROWS:
            self.inputs.append(arguments[0])

    def update(self, batch: Batch) -> None:
        """Adds the rows of a batch: of those that the fusion was run on, in their order."""
        if self.rows >= ROWS:
            self.inputs.clear()
            return
        x = self.inputs.popleft()
        real_B = batch.row_id_B >= 0
        sums = [weight_BUE[real_B].double().sum(0) for weight_BUE in self.fusion.gates(x)]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.rows += int(real_B.sum())

    def means_of_ranks(self) -> list[list[list[float]]]:
        """As `means`, of the rows of all ranks, which call it together; on rank 0."""
        parts = to_first((self.rows, [sum_UE.cpu() for sum_UE in self.sums]))
        if parts is not None:
            self.rows = sum(rows for rows, _ in parts)
            of_level = zip(*(sums for rows, sums in parts if rows), strict=True)  # a rank may have no row at all
            self.sums = [torch.stack(level).sum(0) for level in of_level]
        return self.means()

    def means(self) -> list[list[list[float]]]:
        """U x E mean weights of each level, [] for a model without gates."""
        return [(sum_UE / max(self.rows, 1)).tolist() for sum_UE in self.sums]
