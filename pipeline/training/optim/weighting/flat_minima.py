"""Task-based flat minima: each task's gradient where its own loss is sharpest nearby."""

# Shapes: B rows, T tasks, T1 the tasks and one more, P shared parameters, all in one row, E width of all embeddings.

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from features.batch import Batch
from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import (
    GRADIENT_REFUSALS,
    EmbeddingLoss,
    Weighted,
    add_to_gradients,
    flat_gradient,
    global_mean,
)
from pipeline.training.optim.weighting.pcgrad import PCGradLoss


class FlatMinima(Weighted):
    """As pcgrad, but on gradients that seek flat minima of every task (FlatMinimaLoss).

    When: tasks with few labels overfit; a forward and two backward passes more of the dense part per task.

    Attributes:
        rho: how far the shared parameters are moved, as a norm.
    """

    name: Literal["flat_minima"] = "flat_minima"
    rho: float = Field(0.05, gt=0, allow_inf_nan=False)
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """FlatMinimaLoss."""
        return FlatMinimaLoss(loss_weights, self.rho, seed)


class FlatMinimaLoss(PCGradLoss, EmbeddingLoss):
    """Sharpness-aware gradients by task (Phan et al. 2022, Improving Multi-task Learning via Seeking Task-based Flat Regions).

    With g_t the gradient of task t's loss by the shared parameters theta, s_t is its gradient at theta + rho g_t / |g_t|, and
    f_t = s_t - g_t the part that seeks flatness. The parts g and f are each combined over tasks by a gradient method, and
    added. The paper itself was not reachable here; this much is what reviews of its submission to ICLR 2024 agree on.

    Chosen here: PCGrad as that method, one of those that the paper is paired with, in the same order for both parts; rho, the
    value usual for SAM; g_t over the global batch, so that ranks do not matter; embeddings held while the dense part is
    run again, with the same random draws. Tables and towers get the plain sum of the gradients where the parameters are: the
    paper perturbs what is not shared too.

    Args:
        loss_weights: per task. rho: see FlatMinima. seed: as for PCGradLoss.
    """

    def __init__(self, loss_weights: Sequence[float], rho: float, seed: int) -> None:
        super().__init__(loss_weights, seed)
        self.rho = rho

    def from_embeddings(
        self,
        run: Callable[[Sequence[Tensor]], Tensor],
        embedding_BE: Tensor,  # noqa: ARG002
        loss_BT: Tensor,  # noqa: ARG002
        batch: Batch,
        total_T1: Tensor,
    ) -> float:
        """Takes the gradients at the perturbed parameters; adds nothing to the loss."""
        weight_BT = batch.weight_BT * batch.observed_BT
        norm_T = self.gradient_TP.norm(dim=1).clamp(min=torch.finfo(self.gradient_TP.dtype).tiny)
        sizes = [parameter.numel() for parameter in self.shared]
        rows = []
        for task, gradient_P in enumerate(self.gradient_TP):
            parts = (self.rho / norm_T[task] * gradient_P).split(sizes)
            with torch.no_grad():
                moved = [p + part.view_as(p) for p, part in zip(self.shared, parts, strict=True)]
            values = [value.requires_grad_() for value in moved]
            rows.append(flat_gradient(self.means(run(values), weight_BT, total_T1[:-1])[task], values))
        self.flat_TP = global_mean(torch.stack(rows)) - self.gradient_TP
        return 0.0

    def after_backward(self, step: int) -> None:
        """Adds what projection changes in g, and the projected sum of f."""
        super().after_backward(step)
        coefficient_T = self.coefficients(self.flat_TP @ self.flat_TP.T, step)
        add_to_gradients(self.shared, coefficient_T @ self.flat_TP)
