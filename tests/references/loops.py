"""What the references written as functions share: float64, one row and network at a time, parameters by name.

Where a fusion is called with more than x, or a part is not timed by itself, its reference is a function (params, x) -> output.
Of the module it knows the names and shapes of the parameters, so that autograd through it gives gradients of the very tensors
that the module holds.
"""

# Shapes: S networks, E experts, D width in, H width out.

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


def mlp(params: Params, prefix: str, network: int, depth: int, x_D: Tensor) -> Tensor:
    """y = relu(x W + b), layer after layer, of one of the networks under `prefix`."""
    for layer in range(depth):
        weight_DH = params[f"{prefix}layers.{layer}.weight_SDH"][network]
        bias_H = params[f"{prefix}layers.{layer}.bias_SH"][network]
        x_D = torch.relu(x_D @ weight_DH + bias_H)
    return x_D


def softmax(score_E: Sequence[Tensor]) -> list[Tensor]:
    """exp(a_i) / sum_j exp(a_j), shifted so that the largest exponent is 0."""
    top = max(score.item() for score in score_E)
    power_E = [(score - top).exp() for score in score_E]
    return [power / sum(power_E) for power in power_E]


def mix(weight_E: Sequence[Tensor], expert_ED: Sequence[Tensor]) -> Tensor:
    """sum_i w_i E_i."""
    total_D = torch.zeros_like(expert_ED[0])
    for weight, expert_D in zip(weight_E, expert_ED, strict=True):
        total_D = total_D + weight * expert_D
    return total_D
