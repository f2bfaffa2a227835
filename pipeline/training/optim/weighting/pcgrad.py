"""PCGrad: gradients of the shared parameters without what conflicts."""

# Shapes: T tasks, S = T - 1.

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import GRADIENT_REFUSALS, SharedGradientLoss, Weighted


class PCGrad(Weighted):
    """As fixed, less the parts of the tasks' gradients that conflict (PCGradLoss).

    When: tasks pull the shared part in opposite directions; a backward more per task.
    """

    name: Literal["pcgrad"] = "pcgrad"
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """PCGradLoss."""
        return PCGradLoss(loss_weights, seed)


class PCGradLoss(SharedGradientLoss):
    """Gradients of the shared parameters without what one task's has against another's (PCGrad, Yu et al., NeurIPS 2020).

    The gradients are those of the losses times their loss weights. Towers and tables get the plain sum of the gradients.

    Args:
        loss_weights: per task. seed: of the order of projections.
    """

    def __init__(self, loss_weights: Sequence[float], seed: int) -> None:
        super().__init__(loss_weights)
        self.seed = seed

    def coefficients(self, dot_TT: Tensor, step: int) -> Tensor:
        """Projections in an order that is drawn for each step."""
        order_TS = orders(len(self.weight_T), self.seed * 1_000_003 + step).to(dot_TT.device)
        return projected(dot_TT * self.weight_T * self.weight_T.unsqueeze(1), order_TS) * self.weight_T


def orders(num_tasks: int, seed: int) -> Tensor:
    """order_TS: for each task the others, in random order; the same on every rank."""
    draw_TT = torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(seed))
    return draw_TT.fill_diagonal_(2).argsort(1)[:, :-1]


def projected(dot_TT: Tensor, order_TS: Tensor) -> Tensor:
    """How often each task's gradient counts in the sum of the projected ones (PCGrad, algorithm 1): share_T.

    It is 1 for each where there is no conflict. The algorithm only ever adds multiples of the tasks' gradients to each
    other, so their dot products are all it needs.

    Args:
        dot_TT: <g_s, g_t>. order_TS: in which order the gradient of task t meets those of the others.
    """
    dot_TT = dot_TT.double()
    mix_TT = torch.eye(len(dot_TT), dtype=torch.float64, device=dot_TT.device)  # row t: g_t as it is by now
    for other_T in order_TS.unbind(1):
        against_T = (mix_TT * dot_TT[other_T]).sum(1).clamp(max=0)
        square_T = dot_TT.diagonal()[other_T].clamp(min=torch.finfo(torch.float64).tiny)
        mix_TT.scatter_add_(1, other_T.unsqueeze(1), -(against_T / square_T).unsqueeze(1))
    return mix_TT.sum(0).float()
