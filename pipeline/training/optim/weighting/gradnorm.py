"""GradNorm: weights that even the tasks' gradients out.

Where experts are gated there is no last shared layer, of which GradNorm's paper takes the norm for its cost's sake; the norm
over all shared parameters measures what the tasks do to the shared part.
"""

# Shapes: T tasks.

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import GRADIENT_REFUSALS, GradientLoss, WeightingSettings


class GradNorm(WeightingSettings):
    """Learnt from the tasks' gradients (GradNormLoss); the schema's loss weights do not count.

    When: losses of different scales whose tasks should learn at like rates; a backward more per task.

    Attributes:
        alpha: how much a task that learns more slowly than the others gains; 0 only evens the gradients' norms out.
        lr: share by which a weight changes in a step, about.
    """

    name: Literal["gradnorm"] = "gradnorm"
    alpha: float = Field(1.5, ge=0, allow_inf_nan=False)
    lr: float = Field(0.025, gt=0, allow_inf_nan=False)
    refuses: ClassVar = GRADIENT_REFUSALS
    positive: ClassVar = True

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """GradNormLoss."""
        return GradNormLoss(len(loss_weights), self.alpha, self.lr)


class GradNormLoss(GradientLoss):
    """Weights that make the tasks learn at like rates (GradNorm, Chen et al., ICML 2018, algorithm 1).

    The weights and the first losses are part of the model's state. A task's first loss is that of the first step that
    observes it. All weights are 1 at the start.

    Args:
        num_tasks: T. alpha, lr: see `balanced`.
    """

    initial_T: Tensor

    def __init__(self, num_tasks: int, alpha: float, lr: float) -> None:
        super().__init__([1.0] * num_tasks)
        self.alpha, self.lr = alpha, lr
        self.register_buffer("weight_T", torch.ones(num_tasks))
        self.register_buffer("initial_T", torch.zeros(num_tasks))

    def after_backward(self, step: int) -> None:  # noqa: ARG002
        """Changes the weights for the next step."""
        self.initial_T.copy_(torch.where(self.initial_T == 0, self.global_T, self.initial_T))
        norm_T = self.gradient_TP.norm(dim=1)
        self.weight_T.copy_(balanced(self.weight_T, norm_T, self.global_T, self.initial_T, self.alpha, self.lr))


def balanced(weight_T: Tensor, norm_T: Tensor, mean_T: Tensor, initial_T: Tensor, alpha: float, lr: float) -> Tensor:
    """The next weights: a step down the gradient of GradNorm's loss (eq. 2), then the sum is T again.

    With G_t = w_t |gradient of L_t|, its mean G over tasks, and r_t = (L_t / L_t(0)) over its own mean, the loss is
    sum |G_t - G r_t^alpha|, in which G r_t^alpha (eq. 1) is held constant. A plain step could make a weight negative, and
    its size would depend on the scale of the losses. So the step is taken in log w_t and in units of G:
    w_t exp(-lr w_t dloss/dw_t / G). Tasks of loss 0, above all those that the batch does not observe, count in no mean and
    get no step.

    Args:
        weight_T: w_t. norm_T: of the gradients of the losses without their weights. mean_T, initial_T: L_t and L_t(0).
    """
    tiny = torch.finfo(mean_T.dtype).tiny
    seen_T = mean_T != 0
    count = seen_T.sum().clamp(min=1)
    own_T = weight_T * norm_T * seen_T
    mean = (own_T.sum() / count).clamp(min=tiny)
    ratio_T = mean_T / initial_T.clamp(min=tiny)
    rate_T = ratio_T / (ratio_T.sum() / count).clamp(min=tiny)
    slope_T = own_T / mean * torch.sign(own_T - mean * rate_T**alpha)
    next_T = weight_T * torch.exp(-lr * slope_T)
    return next_T * len(next_T) / next_T.sum()
