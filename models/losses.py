"""Losses per row and task, and their sum as the mean over what was observed."""

# Shapes: B rows, T tasks.

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TaskLoss(nn.Module):
    """Binary cross-entropy or squared error by task, over observed rows, weighted by row and by task.

    A task's loss is sum(w * loss) / sum(w) over the observed rows of the *global* batch, so that it does not depend on how
    ranks share them; the total is the sum of the tasks' losses, each times its loss weight.

    Args:
        kinds: "binary" or "regression" per task. loss_weights: per task.
    """

    binary_T: Tensor
    weight_T: Tensor

    def __init__(self, kinds: Sequence[str], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("binary_T", torch.tensor([kind == "binary" for kind in kinds]), persistent=False)
        self.register_buffer("weight_T", torch.tensor(loss_weights), persistent=False)

    def per_row(self, logit_BT: Tensor, label_BT: Tensor) -> Tensor:
        """loss_BT in float32, whether observed or not; soft labels in [0, 1] are allowed for binary tasks."""
        logit_BT = logit_BT.float()
        cross_entropy_BT = F.binary_cross_entropy_with_logits(logit_BT, label_BT, reduction="none")
        return torch.where(self.binary_T, cross_entropy_BT, (logit_BT - label_BT).square())

    def forward(self, loss_BT: Tensor, mass_BT: Tensor, total_T: Tensor) -> Tensor:
        """The scalar to differentiate.

        Args:
            loss_BT: from `per_row`.
            mass_BT: weight of observed rows, 0 elsewhere.
            total_T: sum of mass_BT over the global batch; a task that is nowhere observed adds 0.
        """
        mean_T = (loss_BT * mass_BT).sum(0) / total_T.clamp(min=torch.finfo(total_T.dtype).tiny)
        return (mean_T * self.weight_T).sum()
