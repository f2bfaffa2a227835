"""Dynamic weight average: tasks whose loss falls more slowly weigh more."""

# Shapes: B rows, T tasks.

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import AdaptiveLoss, Weighted, global_mean


class DWA(Weighted):
    """By how fast losses fell from one window of steps to the next (DWALoss), times the schema's loss weights.

    When: tasks that converge at different speeds, at no cost; it does not even out the losses' scales.

    Attributes:
        temperature: of the softmax over tasks; the larger, the more alike the weights. 2 is the paper's.
        window: steps whose mean loss takes the place of that of an epoch.
    """

    name: Literal["dwa"] = "dwa"
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    window: int = Field(200, ge=1)
    positive: ClassVar = True

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """DWALoss."""
        return DWALoss(loss_weights, self.temperature, self.window)


class DWALoss(AdaptiveLoss):
    """Task losses weighted by lambda_t = T exp(r_t / tau) / sum_s exp(r_s / tau) (Liu et al., CVPR 2019, eq. 7).

    r_t is the mean loss of the last window over that of the window before, tau the temperature. As in the paper, weights are 1
    until there are two. Chosen here: windows of steps in place of epochs, since a log may be read once; a task's mean is over
    the steps that observe it; r_t is 1 for a task that one of the two windows did not observe.

    Args:
        loss_weights: per task, a further factor.
        temperature: tau. window: steps.
    """

    rate_T: Tensor
    sum_T: Tensor
    count_T: Tensor
    previous_T: Tensor
    steps: Tensor

    def __init__(self, loss_weights: Sequence[float], temperature: float, window: int) -> None:
        super().__init__(loss_weights)
        self.temperature, self.window = temperature, window
        self.register_buffer("rate_T", torch.ones(len(loss_weights)))
        for name in ("sum_T", "count_T", "previous_T"):
            self.register_buffer(name, torch.zeros(len(loss_weights)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of the window so far
        self.step_T: Tensor | None = None

    def weights(self) -> Tensor:
        """lambda_t times the loss weight."""
        return self.weight_T * self.rate_T

    def before_step(self) -> None:
        """Forgets the losses of a step that was not finished."""
        self.step_T = None

    def means(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """Also adds the losses, of a batch or of its micro-batches, to those of the step."""
        mean_T = super().means(loss_BT, observed_weight_BT, total_T)
        self.step_T = mean_T.detach() if self.step_T is None else self.step_T + mean_T.detach()
        return mean_T

    def after_update(self) -> None:
        """Adds the step to its window; at the end of a window, the next weights."""
        assert self.step_T is not None
        loss_T = global_mean(self.step_T)
        self.sum_T += loss_T
        self.count_T += loss_T != 0
        self.steps += 1
        end = self.steps == self.window  # stays on the device: nothing waits for it
        mean_T = self.sum_T / self.count_T.clamp(min=1)
        self.rate_T.copy_(torch.where(end, rates(mean_T, self.previous_T, self.temperature), self.rate_T))
        self.previous_T.copy_(torch.where(end, mean_T, self.previous_T))
        for value in (self.sum_T, self.count_T, self.steps):
            value *= ~end


def rates(mean_T: Tensor, previous_T: Tensor, temperature: float) -> Tensor:
    """lambda_T from the mean losses of a window and of the one before; 0 where a window did not observe the task."""
    known_T = (mean_T != 0) & (previous_T != 0)
    ratio_T = torch.where(known_T, mean_T / previous_T.masked_fill(~known_T, 1.0), 1.0)
    return len(mean_T) * torch.softmax(ratio_T / temperature, 0)
