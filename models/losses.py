"""The total of losses per row and task (models.row_losses) over observed rows."""

# Shapes: B rows, T tasks.

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TaskLoss(nn.Module):
    """The mean of each task's losses over observed rows, weighted by row, and their sum, weighted by task.

    A task's loss is sum(w * loss) / sum(w) over the observed rows of the *global* batch, so that it does not depend on how
    ranks share them; the total is the sum of the tasks' losses, each times its loss weight.

    Args:
        loss_weights: per task.
    """

    weight_T: Tensor

    def __init__(self, loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weight_T", torch.tensor(loss_weights), persistent=False)

    def means(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """mean_T: each task's loss without its loss weight; arguments as those of `forward`."""
        # A tiny divisor would overflow to infinity, and infinity times a weight of 0 is NaN.
        return (loss_BT * observed_weight_BT).sum(0) / total_T.masked_fill(total_T == 0, 1.0)

    def weights(self) -> Tensor:
        """weight_T: the current weight of each task's loss."""
        return self.weight_T

    def of_rows(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """The contribution of these rows to the loss; arguments as those of `forward`."""
        return (self.means(loss_BT, observed_weight_BT, total_T) * self.weights()).sum()

    def regulariser(self, total_T: Tensor) -> Tensor | float:  # noqa: ARG002
        """The term of the loss that depends on no row."""
        return 0.0

    def forward(self, loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
        """The scalar to differentiate.

        Args:
            loss_BT: from models.row_losses.
            observed_weight_BT: weight of observed rows, 0 elsewhere.
            total_T: sum of observed_weight_BT over the global batch; a task that is nowhere observed adds 0.
        """
        return self.of_rows(loss_BT, observed_weight_BT, total_T) + self.regulariser(total_T)


class UncertaintyLoss(TaskLoss):
    """Task losses weighted by a learnt variance of each task's noise (Kendall et al., CVPR 2018, eq. 10).

    With s = log sigma^2, which is what the paper learns too, a regression task adds exp(-s) / 2 * L + s / 2 (eq. 7) and a
    binary task, the softmax of two classes, exp(-s) * L + s / 2. A task that no row of the global batch observes adds
    nothing: its variance would shrink without evidence.

    Args:
        kinds: "binary" or "regression" per task.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__([1.0 if kind == "binary" else 0.5 for kind in kinds])
        self.log_variance_T = nn.Parameter(torch.zeros(len(kinds)))

    def weights(self) -> Tensor:
        return self.weight_T * torch.exp(-self.log_variance_T)

    def regulariser(self, total_T: Tensor) -> Tensor:
        """The sum of s / 2 over the tasks that are observed."""
        return (self.log_variance_T * (total_T > 0)).sum() / 2
