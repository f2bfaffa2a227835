"""FAMO: every task's log loss falls at the same rate."""

# Shapes: B rows, T tasks.

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import WHOLE_BATCH_LOSSES, AdaptiveLoss, WeightingSettings, global_mean

EPS = 1e-8  # added to losses before their logarithm, as in the authors' code
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


class FAMO(WeightingSettings):
    """Logits learnt from the fall of log losses (FAMOLoss); the schema's loss weights do not count: log losses have no scale.

    When: some tasks stall while others improve; the balance of gradient methods without their backward passes.

    Attributes:
        lr: of Adam, which learns the logits. gamma: their decay, towards equal ones.
    """

    name: Literal["famo"] = "famo"
    lr: float = Field(0.025, gt=0, allow_inf_nan=False)
    gamma: float = Field(1e-3, ge=0, allow_inf_nan=False)
    refuses: ClassVar = {"accumulate": WHOLE_BATCH_LOSSES}
    positive: ClassVar = True

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """FAMOLoss."""
        return FAMOLoss(len(loss_weights), self.lr, self.gamma)


class FAMOLoss(AdaptiveLoss):
    """Task losses under FAMO (Liu et al., NeurIPS 2023, algorithm 1).

    With z = softmax(xi) a step descends c sum_t z_t log L_t, where c = 1 / sum_t (z_t / L_t): L_t weighs c z_t / L_t, and the
    weights sum to 1. Then xi descends delta + gamma xi, where delta is the derivative of sum_t z_t (log L_t - log L_t') by
    xi, and L_t' the loss after the step.

    Taken: equations, and from the authors' code lr, gamma and Adam for xi. Chosen: L_t' is the loss of the next batch, which
    costs nothing, where the authors' code evaluates the same batch again, a further forward with its exchange of embeddings.
    Noise between batches does not build up: sums of log L_t - log L_t' over steps telescope. A task that a batch does not
    observe, or whose loss is not above 0, has weight 0 there and no part in c; the change of its loss counts as 0.

    Args:
        num_tasks: T. lr, gamma: see FAMO.
    """

    logit_T: Tensor
    moment_T: Tensor
    square_T: Tensor
    previous_T: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, lr: float, gamma: float) -> None:
        super().__init__([1.0 / num_tasks] * num_tasks)
        self.lr, self.gamma = lr, gamma
        for name in ("logit_T", "moment_T", "square_T", "previous_T"):
            self.register_buffer(name, torch.zeros(num_tasks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of Adam

    def forward(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """The scalar to differentiate; arguments as those of `TaskLoss.forward`."""
        mean_T = self.means(loss_BT, observed_weight_BT, total_T)
        loss_T = global_mean(mean_T)
        self.learn(loss_T, (total_T > 0) & (loss_T > 0))
        return (mean_T * self.weights()).sum()

    @torch.no_grad()
    def learn(self, loss_T: Tensor, seen_T: Tensor) -> None:
        """A step of the logits, from the previous batch's losses to these, and the weights of this batch."""
        both_T = seen_T & (self.previous_T != 0)
        change_T = torch.where(both_T, (self.previous_T + EPS).log() - (loss_T + EPS).log(), 0.0)
        share_T = torch.softmax(self.logit_T, 0)
        gradient_T = share_T * (change_T - (share_T * change_T).sum()) + self.gamma * self.logit_T
        self.steps += both_T.any()  # the first batch has none before it
        for state, value, beta in zip(
            (self.moment_T, self.square_T), (gradient_T, gradient_T.square()), BETAS, strict=True
        ):
            state.lerp_(value, 1 - beta)
        moment, square = (1 - beta ** self.steps.clamp(min=1).double() for beta in BETAS)
        self.logit_T -= self.lr * (self.moment_T / moment) / ((self.square_T / square).sqrt() + ADAM_EPS)
        self.previous_T.copy_(torch.where(seen_T, loss_T, 0.0))
        ratio_T = torch.where(seen_T, torch.softmax(self.logit_T, 0) / (loss_T + EPS), 0.0)
        self.weight_T.copy_(ratio_T / ratio_T.sum().clamp(min=torch.finfo(ratio_T.dtype).tiny))
