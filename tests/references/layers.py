"""What the references share: networks of nn.Linear, pairs of parameters, and the comparison with the module under test.

A reference is a fusion as research code writes it: lists of nn.Linear, loops over tasks, experts and gates, from the equations
of the paper; models/ is not imported. Tests compare with it in float64, and towers.py times it as its baseline. Each takes the
arguments of its fusion and has `pairs(module)`: its parameters, each beside the parameter of the module that holds it and the
part of that which it is.
"""

# Shapes: B rows, T tasks, U units with a gate, E experts a gate chooses from, D width.

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]


class Reference(nn.Module):
    """A fusion. Shapes: x_BD or x_BFW -> a list of h_BD, one a task."""

    out_dim: int

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """h_BD of each task, and for every level what each unit's gate gives: weight_BE."""
        raise NotImplementedError

    def gates(self, x: Tensor) -> list[Tensor]:
        """For every level weight_BUE."""
        return [torch.stack(weights, 1) for weights in self.run(x)[1]]

    def pairs(self, module: nn.Module) -> Iterator[Pair]:
        raise NotImplementedError


def mlp(dims: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in zip(dims, dims[1:], strict=False):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers)


def mlps(count: int, dims: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(mlp(dims) for _ in range(count))


def mixed(gate_BE: Tensor, expert_BED: Tensor) -> Tensor:
    """sum_e g_e E_e."""
    return torch.bmm(gate_BE.unsqueeze(1), expert_BED).squeeze(1)


def linear_pairs(linear: nn.Linear, stacked: Any, index: int) -> Iterator[Pair]:
    yield linear.weight, stacked.weight_SDH, lambda weight_SDH: weight_SDH[index].t()
    if linear.bias is not None:
        yield linear.bias, stacked.bias_SH, lambda bias_SH: bias_SH[index]


def mlp_pairs(networks: Iterable[nn.Module], stacked: Any, first: int = 0) -> Iterator[Pair]:
    """Of networks that are `first`, `first` + 1, … of a stack."""
    for index, network in enumerate(networks):
        for linear, layer in zip(network[::2], stacked.layers, strict=True):
            yield from linear_pairs(linear, layer, first + index)


def same_pairs(reference: nn.Module, module: nn.Module) -> Iterator[Pair]:
    """Of two modules with the same parameters in the same order."""
    for one, other in zip(reference.parameters(), module.parameters(), strict=True):
        yield one, other, lambda tensor: tensor


class Towers(Reference):
    """One a task, or, `shared`, one for all with biases of each task; the last layer has no ReLU.

    Shapes: h_BTD, or a list -> out_KBT.
    """

    def __init__(self, num_tasks: int, in_dim: int, widths: Sequence[int], shared: bool, outputs: int = 1) -> None:
        super().__init__()
        self.num_towers = 1 if shared else num_tasks
        self.hidden = mlps(self.num_towers, [in_dim, *widths])
        self.out = nn.ModuleList(nn.Linear([in_dim, *widths][-1], outputs) for _ in range(self.num_towers))
        self.bias_K1T = nn.Parameter(torch.zeros(outputs, 1, num_tasks)) if shared else None

    def forward(self, h: list[Tensor] | Tensor) -> Tensor:
        h = list(h.unbind(1)) if isinstance(h, Tensor) else h
        which = [task % self.num_towers for task in range(len(h))]
        out_TBK = torch.stack([self.out[i](self.hidden[i](h_BD)) for i, h_BD in zip(which, h, strict=True)])
        out_KBT = out_TBK.permute(2, 1, 0)
        return out_KBT if self.bias_K1T is None else out_KBT + self.bias_K1T

    def pairs(self, module: nn.Module) -> Iterator[Pair]:
        if self.bias_K1T is not None:
            yield self.bias_K1T, module.bias_K1T, lambda tensor: tensor
        module = getattr(module, "tower", module)
        yield from mlp_pairs(self.hidden, module.hidden)
        for task, linear in enumerate(self.out):
            yield from linear_pairs(linear, module.out, task)


def copy_parts(pairs: Iterable[Pair]) -> None:
    """Copies weights of a module to its reference."""
    with torch.no_grad():
        for part, whole, pick in pairs:
            part.copy_(pick(whole))


def compared(
    module: nn.Module, reference: Any, x: Tensor, probe: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The module's and the reference's output, and gradients with respect to input and every parameter of the module.

    Args:
        probe: what the output is multiplied with before it is summed; None: drawn.
    """
    copy_parts(reference.to(x.dtype).pairs(module))
    x = x.detach().requires_grad_()
    found, wanted = module(x), reference(x)
    wanted = torch.stack(wanted, 1) if isinstance(wanted, list) else wanted
    if probe is None:
        probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    params, pairs = dict(module.named_parameters()), list(reference.pairs(module))
    found_x, *found_params = torch.autograd.grad(found, [x, *params.values()], probe, materialize_grads=True)
    parts = [part for part, _, _ in pairs]
    wanted_x, *wanted_parts = torch.autograd.grad(wanted, [x, *parts], probe, materialize_grads=True)
    # The gradient of picking puts each part's gradient where the part lies; what no part covers gets 0.
    placed = sum((pick(whole) * part).sum() for (_, whole, pick), part in zip(pairs, wanted_parts, strict=True))
    wanted_params = torch.autograd.grad(placed, list(params.values()), materialize_grads=True)
    gradients = {f"gradient of {n}": both for n, *both in zip(params, found_params, wanted_params, strict=True)}
    return {"output": (found, wanted), "gradient of x": (found_x, wanted_x), **gradients}
