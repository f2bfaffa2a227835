"""Stacks of small networks computed as one batched matrix product."""

# Shapes: S networks of a stack, B rows, D and H widths in and out, E experts, U users of them (tasks or units).

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """S linear layers with weights of their own, each applied to its own input.

    Args:
        stack: S. in_dim, out_dim: D and H, the same for all. bias: whether they have one.
    Shapes: x_SBD -> y_SBH.
    """

    def __init__(self, stack: int, in_dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear does
        self.weight_SDH = nn.Parameter(torch.empty(stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias_SH = nn.Parameter(torch.empty(stack, out_dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x_SBD: Tensor) -> Tensor:
        if self.bias_SH is None:
            return torch.bmm(x_SBD, self.weight_SDH)
        return torch.baddbmm(self.bias_SH.unsqueeze(1), x_SBD, self.weight_SDH)


class StackedMLP(nn.Module):
    """S multi-layer perceptrons with ReLU after every layer.

    Args:
        stack: S. in_dim: D. widths: of the layers, the last is H. dropout: after each layer.
    Shapes: x_SBD -> y_SBH.
    """

    def __init__(self, stack: int, in_dim: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        dims = [in_dim, *widths]
        self.layers = nn.ModuleList(StackedLinear(stack, i, o) for i, o in zip(dims, dims[1:], strict=False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_SBD: Tensor) -> Tensor:
        for layer in self.layers:
            x_SBD = self.dropout(torch.relu_(layer(x_SBD)))
        return x_SBD


def mix(gate_UBE: Tensor, expert_EBD: Tensor) -> Tensor:
    """Each user's weighted sum of the experts, row by row: h_UBD."""
    return torch.bmm(gate_UBE.transpose(0, 1), expert_EBD.transpose(0, 1)).transpose(0, 1)
