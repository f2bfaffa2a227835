"""Single-task networks: the baseline for whether sharing helps."""

# Shapes: B rows, T tasks, D width in and out.

from torch import Tensor

from models.fusion.fusion import Fusion
from models.layers import PLAIN_EXPERTS, ExpertLayers, Widths


class SingleTask(Fusion):
    """One multi-layer perceptron a task; only the embeddings are shared.

    Args:
        in_dim: D in. num_tasks: T. widths: of the layers, the last is D out.
        experts: what a layer is, by default linear and ReLU.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(self, in_dim: int, num_tasks: int, widths: Widths, experts: ExpertLayers = PLAIN_EXPERTS) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        self.networks = experts.stack(num_tasks, in_dim, widths)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_TBD = self.networks(x_BD.unsqueeze(0))
        return h_TBD.transpose(0, 1)
