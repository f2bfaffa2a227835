"""Reference of PEPNet: one row, task and unit at a time, parameters by name (see loops.py)."""

# Shapes: B rows, D width in, I and O widths of what a gate unit reads and gives, H width of a layer.

from collections.abc import Sequence

import torch
from references.loops import Params, mlp
from torch import Tensor


def gate_unit(params: Params, prefix: str, x_I: Tensor) -> Tensor:
    """2 sigmoid(relu(x W + b) W' + b')."""
    inner = torch.relu(params[f"{prefix}squeeze.weight"] @ x_I + params[f"{prefix}squeeze.bias"])
    return 2 / (1 + (-(params[f"{prefix}excite.weight"] @ inner + params[f"{prefix}excite.bias"])).exp())


def pepnet(
    params: Params, x_BD: Tensor, num_tasks: int, widths: Sequence[int], priors: Sequence[int], domains: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """h_BTH, and the mean gate of each task's hidden layers.

    Args:
        priors, domains: columns of x; without domains there is no gate of the input.
    """
    outputs, means = [], []
    for x_D in x_BD:
        o_D = x_D
        if domains:
            read = torch.stack([*(x_D[c] for c in domains), *x_D.detach()])
            o_D = x_D * gate_unit(params, "epnet.", read)
        read = torch.stack([*(x_D[c] for c in priors), *o_D.detach()])
        rows, mean = [], []
        for task in range(num_tasks):
            h_H, own = o_D, []
            for layer, width in enumerate(widths):
                gate_H = gate_unit(params, f"ppnet.{layer}.", read)[task * width : (task + 1) * width]
                h_H = gate_H * mlp(params, f"networks.{layer}.", task, 1, h_H)
                own.append(sum(gate_H) / width)
            rows.append(h_H)
            mean.append(torch.stack(own))
        outputs.append(torch.stack(rows))
        means.append(torch.stack(mean))
    return torch.stack(outputs), [torch.stack(means)]
