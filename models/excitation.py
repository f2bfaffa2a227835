"""Squeeze-and-excitation over the fields of a row."""

# Shapes: B rows, F fields, W width of a token, S networks of a stack.

import torch
from torch import Tensor, nn

from models.layers import StackedLinear


class Excitation(nn.Module):
    """A gate for each field from the means of all (Hu et al., CVPR 2018; over fields: FiBiNET, arXiv 1905.09433).

    gate = 2 sigmoid(V relu(U mean(x) + a) + b), in (0, 2). V and b start at 0: every gate is 1 before training.

    Args:
        stack: S, each with weights of its own. num_fields: F. hidden: width between U and V.
    Shapes: x_SBFW -> gate_SBF.
    """

    def __init__(self, stack: int, num_fields: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = StackedLinear(stack, num_fields, hidden)
        self.excite = StackedLinear(stack, hidden, num_fields)
        for parameter in self.excite.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_SBFW: Tensor) -> Tensor:
        return 2 * self.excite(torch.relu(self.squeeze(x_SBFW.mean(3)))).sigmoid()
