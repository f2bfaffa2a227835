"""Shared bottom (Caruana 1997): one network for all tasks."""

# Shapes: B rows, T tasks, D width.

from torch import Tensor

from models.fusion.fusion import Fusion
from models.layers import PLAIN_EXPERTS, ExpertLayers, Widths


class SharedBottom(Fusion):
    """One multi-layer perceptron whose output every task's tower reads.

    Args:
        in_dim: D in. num_tasks: T. widths: of the layers, the last is D out.
        experts: what a layer is, by default linear and ReLU.
    Shapes: x_BD -> h_BTD, the same for each task.
    """

    def __init__(self, in_dim: int, num_tasks: int, widths: Widths, experts: ExpertLayers = PLAIN_EXPERTS) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        self.bottom = experts.stack(1, in_dim, widths)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_1BD = self.bottom(x_BD.unsqueeze(0))
        return h_1BD.transpose(0, 1).expand(-1, self.num_tasks, -1)
