"""What the references share: networks of nn.Linear, pairs of parameters, and the comparison with the module under test.

A reference is a fusion as research code writes it: lists of nn.Linear, loops over tasks, experts and gates, from the equations
of the paper; models/ is not imported. Tests compare with it in float64, and towers.py times it as its baseline. Each takes the
arguments of its fusion and has `pairs(module)`: its parameters, each beside the parameter of the module that holds it and the
part of that which it is.
"""

# Shapes: B rows, T tasks, U units with a gate, E experts a gate chooses from, D and H width.

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class RowNorm(nn.Module):
    """Ba et al. 2016, row by row: g (x - mean) / sqrt(variance + 1e-5) + b, the variance divided by H."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_H, self.shift_H = nn.Parameter(torch.rand(dim)), nn.Parameter(torch.rand(dim))

    def forward(self, x_BH: Tensor) -> Tensor:
        rows = []
        for x_H in x_BH:
            centred_H = x_H - sum(x_H) / len(x_H)
            variance = sum(centred_H * centred_H) / len(x_H)
            rows.append(self.gain_H * centred_H / (variance + 1e-5) ** 0.5 + self.shift_H)
        return torch.stack(rows)


class Gelu(nn.Module):
    """x Phi(x), Phi the distribution function of the standard normal."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2


class Silu(nn.Module):
    """x / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


ACTIVATIONS = {"relu": nn.ReLU, "gelu": Gelu, "silu": Silu}


def mlp(dims: Sequence[int], activation: str = "relu", norm: str = "none") -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in zip(dims, dims[1:], strict=False):
        layers += [nn.Linear(inner, outer), *([RowNorm(outer)] if norm == "layer" else []), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def mlps(count: int, dims: Sequence[int], experts: Mapping[str, Any] | None = None) -> nn.ModuleList:
    """Networks; experts: their activation and norm, as a config names them."""
    return nn.ModuleList(mlp(dims, **(experts or {})) for _ in range(count))


def gate_network(in_dim: int, num_experts: int, bias: bool = False, layers: Sequence[int] = ()) -> nn.Sequential:
    """The scores of experts: a linear layer above hidden ones with ReLU."""
    return nn.Sequential(*mlp([in_dim, *layers]), nn.Linear([in_dim, *layers][-1], num_experts, bias=bias))


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
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        for linear, layer in zip(linears, stacked.layers, strict=True):
            yield from linear_pairs(linear, layer, first + index)
        norms = [layer for layer in network if isinstance(layer, RowNorm)]
        for norm, layer in zip(norms, stacked.norms, strict=True):
            yield norm.gain_H, layer.scale_SH, lambda scale_SH, s=first + index: scale_SH[s]
            yield norm.shift_H, layer.shift_SH, lambda shift_SH, s=first + index: shift_SH[s]


def gate_pairs(gate: nn.Sequential, stacked: Any, index: int, seen: Sequence[int] | None = None) -> Iterator[Pair]:
    """Of a gate; seen: the experts that it chooses from, out of all of the stack's; None: all."""
    yield from mlp_pairs([gate[:-1]], stacked.hidden, index)
    linear, seen = gate[-1], range(len(gate[-1].weight)) if seen is None else seen
    yield linear.weight, stacked.weight_SDH, lambda weight_SDH: weight_SDH[index][:, seen].t()
    if linear.bias is not None:
        yield linear.bias, stacked.bias_SH, lambda bias_SH: bias_SH[index][seen]


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
