"""NE over the last steps of training."""

# Shapes: B rows, T tasks, N updates in a window, 3 sums: weight·loss, weight, weight·label.

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.metrics.base import Tasks
from pipeline.evaluation.metrics.binary import entropy


class WindowedNE:
    """NE of each task over the last N updates, for the trainer: sums only, on the device until a value is asked for.

    A regression task has no entropy: its value is the weighted mean loss.

    Args:
        tasks: (name, kind), as for `Metrics`.
        window: N.
        device: where the tensors of the updates are.
    """

    def __init__(self, tasks: Tasks, window: int, device: torch.device | str = "cpu") -> None:
        self.binary = [kind == "binary" for _, kind in tasks]
        self.updates = 0
        self.sums_NT3 = torch.zeros(window, len(self.binary), 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, loss_BT: Tensor, label_BT: Tensor, observed_BT: Tensor, weight_BT: Tensor) -> Tensor:
        """Replaces the oldest update by B rows and returns their sums, as `sums_T3` has them of the window.

        `loss_BT` is per row, in nats for a binary task, not yet weighted.
        """
        weight_BT = torch.where(observed_BT.bool(), weight_BT, 0.0).double()
        ignored_BT = weight_BT == 0
        # Filled after the product: a row that does not count may hold NaN.
        loss_BT, label_BT = ((weight_BT * x_BT).masked_fill_(ignored_BT, 0.0) for x_BT in (loss_BT, label_BT))
        sums_T3 = torch.stack([x_BT.sum(0) for x_BT in (loss_BT, weight_BT, label_BT)], dim=-1)
        self.sums_NT3[self.updates % len(self.sums_NT3)] = sums_T3
        self.updates += 1
        return sums_T3

    def sums_T3(self) -> Tensor:  # noqa: N802
        """Sums of weight·loss, weight and weight·label over the window: additive over ranks."""
        return self.sums_NT3.sum(0)

    def value(self, sums_T3: Tensor | None = None) -> list[float]:
        """NE (regression: mean loss) per task, NaN without rows or with one class.

        Args:
            sums_T3: sums to use, e.g. those of all ranks; this one's window by default.
        """
        sums = (self.sums_T3() if sums_T3 is None else sums_T3).tolist()
        return [
            _windowed(loss, weight, positive, binary)
            for (loss, weight, positive), binary in zip(sums, self.binary, strict=True)
        ]


def _windowed(loss: float, weight: float, positive: float, binary: bool) -> float:
    if not binary:
        return loss / weight if weight else math.nan
    # An all-reduce may add the two sums in different orders, so those of one class need not be equal to the last bit; a
    # true base rate of 1e-12 would need 1e12 rows in the window.
    one_class = min(positive, weight - positive) <= 1e-12 * weight
    return math.nan if one_class else loss / float(entropy(np.array(positive), np.array(weight - positive)))
