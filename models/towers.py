"""Towers: from what the fusion made for each task to one logit a task."""

# Shapes: B rows, T tasks, D width.

from collections.abc import Sequence

from torch import Tensor, nn

from models.layers import StackedLinear, StackedMLP


class TaskTowers(nn.Module):
    """One multi-layer perceptron a task, all computed together.

    Args:
        num_tasks: T. in_dim: D. widths: hidden layers, may be empty. dropout: after each hidden layer.
    Shapes: h_BTD -> logit_BT.
    """

    def __init__(self, num_tasks: int, in_dim: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = StackedMLP(num_tasks, in_dim, widths, dropout)
        self.out = StackedLinear(num_tasks, widths[-1] if widths else in_dim, 1)

    def forward(self, h_BTD: Tensor) -> Tensor:
        logit_TB1 = self.out(self.hidden(h_BTD.transpose(0, 1)))
        return logit_TB1.squeeze(2).transpose(0, 1)
