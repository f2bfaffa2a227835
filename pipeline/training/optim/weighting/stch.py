"""Smooth Tchebycheff scalarisation: a smooth maximum of the tasks' losses."""

# Shapes: B rows, T tasks.

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import WHOLE_BATCH_LOSSES, AdaptiveLoss, Weighted, global_mean

EPS = 1e-8


class STCH(Weighted):
    """A smooth maximum over tasks of the log loss above a reference (STCHLoss); loss weights are the paper's preferences.

    When: the worst task matters most. A small mu approaches the maximum itself, a large one the sum.

    Attributes:
        mu: smoothness.
        warmup: steps on the sum of log losses; the mean losses over their second half become the reference.
    """

    name: Literal["stch"] = "stch"
    mu: float = Field(1.0, gt=0, allow_inf_nan=False)
    warmup: int = Field(400, ge=1)
    refuses: ClassVar = {"accumulate": WHOLE_BATCH_LOSSES}
    positive: ClassVar = True

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """STCHLoss."""
        return STCHLoss(loss_weights, self.mu, self.warmup)


class STCHLoss(AdaptiveLoss):
    """T mu log sum_t exp(w_t (l_t - z_t) / mu) (Lin et al., ICML 2024), with l_t = log(L_t / R_t) and z_t = 0.

    The paper's scalarisation is mu log sum_t exp(w_t (f_t - z_t) / mu). Taken from the authors' code for multi-task
    learning: objectives f_t are log losses relative to a reference R_t, the mean losses at the end of a warm-up on
    sum_t w_t log L_t; the ideal point z is 0; the factor T; mu = 1. Chosen here: a warm-up in steps, of which the second half
    gives R_t (the code: 4 epochs, and the one after them); a task without a reference has l_t = 0; tasks that a batch does
    not observe, or whose loss is not above 0, are left out of the sum and of T.

    Args:
        loss_weights: w_t. mu, warmup: see STCH.
    """

    sum_T: Tensor
    count_T: Tensor
    steps: Tensor
    used_T: Tensor

    def __init__(self, loss_weights: Sequence[float], mu: float, warmup: int) -> None:
        super().__init__(loss_weights)
        self.mu, self.warmup = mu, warmup
        for name in ("sum_T", "count_T"):
            self.register_buffer(name, torch.zeros(len(loss_weights)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used_T", torch.tensor(loss_weights), persistent=False)

    def weights(self) -> Tensor:
        """The derivative of the scalarisation by each loss, in the step before."""
        return self.used_T

    def forward(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """The scalar to differentiate; arguments as those of `TaskLoss.forward`."""
        mean_T = self.means(loss_BT, observed_weight_BT, total_T)
        loss_T = global_mean(mean_T)
        self.loss_T, seen_T = loss_T.clamp(min=0), (total_T > 0) & (loss_T > 0)
        reference_T = torch.where(self.count_T > 0, self.sum_T / self.count_T.clamp(min=1), self.loss_T)
        smooth_T = slopes(self.loss_T, reference_T, seen_T, self.weight_T, self.mu)
        early_T = self.weight_T * seen_T / (self.loss_T + EPS)
        self.used_T.copy_(torch.where(self.steps < self.warmup, early_T, smooth_T))
        return (mean_T * self.used_T).sum()

    def after_update(self) -> None:
        """Adds the losses of a step in the second half of the warm-up to the reference."""
        counts = (self.steps >= self.warmup // 2) & (self.steps < self.warmup)
        self.sum_T += self.loss_T * counts
        self.count_T += (self.loss_T != 0) & counts
        self.steps += 1


def slopes(loss_T: Tensor, reference_T: Tensor, seen_T: Tensor, weight_T: Tensor, mu: float) -> Tensor:
    """The derivative by L_t: T w_t / L_t times the softmax of w_t log(L_t / R_t) / mu, over the tasks that are seen."""
    objective_T = weight_T * ((loss_T + EPS) / (reference_T + EPS)).log() / mu
    share_T = torch.softmax(objective_T.masked_fill(~seen_T, -torch.inf), 0).nan_to_num(0.0)
    return seen_T.sum() * share_T * weight_T / (loss_T + EPS)
