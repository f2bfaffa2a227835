"""The fusions as research code writes them: lists of nn.Linear, loops over experts, tasks and gates; taskfuse not imported.

A level's experts are stacked to (B, E, D) once, and each gate is multiplied with the stack by itself. Every class takes the
arguments of its fusion and has `pairs(ours)`: its parameters, each beside the parameter of ours that holds it and the part of
that it is. By these the weights are copied and the gradients compared.
"""

# Shapes: B rows, T tasks, E experts a gate chooses from, D width.

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]


def mlp(dims: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in zip(dims, dims[1:], strict=False):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers)


def mlps(count: int, dims: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(mlp(dims) for _ in range(count))


def mixed(gate_BE: Tensor, expert_BED: Tensor) -> Tensor:
    return torch.bmm(gate_BE.unsqueeze(1), expert_BED).squeeze(1)


def linear_pairs(linear: nn.Linear, stacked: nn.Module, index: int) -> Iterator[Pair]:
    yield linear.weight, stacked.weight_SDH, lambda weight_SDH: weight_SDH[index].t()
    if linear.bias is not None:
        yield linear.bias, stacked.bias_SH, lambda bias_SH: bias_SH[index]


def mlp_pairs(networks: Iterable[nn.Sequential], stacked: nn.Module, first: int = 0) -> Iterator[Pair]:
    """Of networks that are `first`, `first` + 1, … of a stack."""
    for index, network in enumerate(networks):
        for linear, layer in zip(network[::2], stacked.layers, strict=True):
            yield from linear_pairs(linear, layer, first + index)


class SharedBottom(nn.Module):
    def __init__(self, in_dim: int, num_tasks: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        self.bottom = mlps(1, [in_dim, *widths])

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        return [self.bottom[0](x_BD)] * self.num_tasks

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        return mlp_pairs(self.bottom, ours.bottom)


class SingleTask(nn.Module):
    def __init__(self, in_dim: int, num_tasks: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.out_dim = widths[-1]
        self.networks = mlps(num_tasks, [in_dim, *widths])

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        return [network(x_BD) for network in self.networks]

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        return mlp_pairs(self.networks, ours.networks)


class CrossStitch(nn.Module):
    def __init__(self, in_dim: int, num_tasks: int, levels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, levels[-1][-1]
        dims = [in_dim, *(widths[-1] for widths in levels)]
        self.networks = nn.ModuleList(mlps(num_tasks, [d, *w]) for d, w in zip(dims, levels, strict=False))
        self.stitch_TT = nn.ParameterList(torch.rand(num_tasks, num_tasks) for _ in levels)

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        h = [x_BD] * self.num_tasks
        for networks, stitch_TT in zip(self.networks, self.stitch_TT, strict=True):
            out = [network(h_BD) for network, h_BD in zip(networks, h, strict=True)]
            h = [sum(share * out_BD for share, out_BD in zip(stitch_T, out, strict=True)) for stitch_T in stitch_TT]
        return h

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        for level, networks in enumerate(self.networks):
            yield from mlp_pairs(networks, ours.networks[level])
            yield self.stitch_TT[level], ours.stitch_LST, lambda stitch_LST, level=level: stitch_LST[level]


class MMoE(nn.Module):
    def __init__(self, in_dim: int, num_tasks: int, num_experts: int, levels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.num_experts, self.out_dim = num_experts, levels[-1][-1]
        dims = [in_dim, *(widths[-1] for widths in levels)]
        users = [num_experts] * (len(levels) - 1) + [num_tasks]
        self.experts = nn.ModuleList(mlps(num_experts, [d, *w]) for d, w in zip(dims, levels, strict=False))
        self.gates = nn.ModuleList(
            nn.ModuleList(nn.Linear(in_dim, num_experts, bias=False) for _ in range(count)) for count in users
        )

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        h = [x_BD] * self.num_experts
        for experts, gates in zip(self.experts, self.gates, strict=True):
            expert_BED = torch.stack([expert(h_BD) for expert, h_BD in zip(experts, h, strict=True)], 1)
            h = [mixed(gate(x_BD).softmax(1), expert_BED) for gate in gates]
        return h

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        for level, experts in enumerate(self.experts):
            yield from mlp_pairs(experts, ours.experts[level])
            for user, gate in enumerate(self.gates[level]):
                yield from linear_pairs(gate, ours.gate[level], user)


class Units(nn.Module):
    """What PLE and AdaTT have in common: experts by unit, the shared unit last, and a gate each."""

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Sequence[Sequence[int]], task_experts: int, shared_experts: int
    ) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, levels[-1][-1]
        self.counts = [task_experts] * num_tasks + [shared_experts] * (shared_experts > 0)
        dims = [in_dim, *(widths[-1] for widths in levels)]
        self.units = [len(self.counts)] * (len(levels) - 1) + [num_tasks]
        self.experts = nn.ModuleList(
            nn.ModuleList(mlps(count, [d, *w]) for count in self.counts) for d, w in zip(dims, levels, strict=False)
        )
        self.gates = nn.ModuleList(
            nn.ModuleList(nn.Linear(d, len(self.seen(unit)), bias=False) for unit in range(units))
            for d, units in zip(dims, self.units, strict=False)
        )

    def seen(self, unit: int) -> list[int]:
        """The experts that a unit's gate chooses from."""
        return list(range(sum(self.counts)))

    def outputs(self, level: int, h: list[Tensor]) -> list[list[Tensor]]:
        """Of all experts, by unit."""
        return [[expert(h_BD) for expert in experts] for experts, h_BD in zip(self.experts[level], h, strict=True)]

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        for level, units in enumerate(self.experts):
            first = 0
            for count, experts in zip(self.counts, units, strict=True):
                yield from mlp_pairs(experts, ours.levels[level].experts, first)
                first += count
            for unit, gate in enumerate(self.gates[level]):
                seen = self.seen(unit)
                weight = ours.levels[level].gate.weight_SDH
                yield gate.weight, weight, lambda weight_SDH, unit=unit, seen=seen: weight_SDH[unit][:, seen].t()


class PLE(Units):
    def seen(self, unit: int) -> list[int]:
        if unit == self.num_tasks:
            return super().seen(unit)
        first, own = sum(self.counts[:unit]), self.counts[unit]
        return [*range(first, first + own), *range(sum(self.counts[: self.num_tasks]), sum(self.counts))]

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        h = [x_BD] * len(self.counts)
        for level, gates in enumerate(self.gates):
            flat = [expert_BD for unit in self.outputs(level, h) for expert_BD in unit]
            h = [
                mixed(gate(h_BD).softmax(1), torch.stack([flat[e] for e in self.seen(unit)], 1))
                for unit, (gate, h_BD) in enumerate(zip(gates, h, strict=False))
            ]
        return h


class AdaTT(Units):
    def __init__(
        self, in_dim: int, num_tasks: int, levels: Sequence[Sequence[int]], task_experts: int, shared_experts: int
    ) -> None:
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts)
        self.natives = nn.ModuleList(
            nn.ParameterList(torch.rand(1, self.counts[unit]) for unit in range(units)) for units in self.units
        )

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        h = [x_BD] * len(self.counts)
        for level, (gates, natives) in enumerate(zip(self.gates, self.natives, strict=True)):
            by_unit = self.outputs(level, h)
            expert_BED = torch.stack([expert_BD for unit in by_unit for expert_BD in unit], 1)
            new = []
            for unit, (gate, native_1E) in enumerate(zip(gates, natives, strict=True)):
                own_BD = torch.stack(by_unit[unit], 1)
                own_BD = torch.matmul(native_1E, own_BD).squeeze(1) if own_BD.shape[1] > 1 else own_BD[:, 0]
                new.append(mixed(gate(h[unit]).softmax(1), expert_BED) + own_BD)
            h = new
        return h

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        yield from super().pairs(ours)
        for level, natives in enumerate(self.natives):
            for unit, native_1E in enumerate(natives):
                own = slice(sum(self.counts[:unit]), sum(self.counts[: unit + 1]))
                if self.counts[unit] > 1:  # else it is 1 and not learnt
                    weight = ours.levels[level].native_OE
                    yield native_1E, weight, lambda native_OE, unit=unit, own=own: native_OE[unit : unit + 1, own]


class AITM(nn.Module):
    def __init__(self, in_dim: int, num_tasks: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.out_dim = dim = widths[-1]
        self.networks = mlps(num_tasks, [in_dim, *widths])
        self.passes = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_tasks - 1))
        self.heads = nn.ModuleList(  # h1, h2, h3
            nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3)) for _ in range(num_tasks - 1)
        )

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        q = [network(x_BD) for network in self.networks]
        h = q[:1]
        for task, (pass_on, (h1, h2, h3)) in enumerate(zip(self.passes, self.heads, strict=True), 1):
            p_BD = torch.relu(pass_on(h[-1]))
            scores = [(h2(u_BD) * h3(u_BD)).sum(1) / self.out_dim**0.5 for u_BD in (p_BD, q[task])]
            weight_B2 = torch.stack(scores, 1).softmax(1)
            h.append(weight_B2[:, :1] * h1(p_BD) + weight_B2[:, 1:] * h1(q[task]))
        return h

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        yield from mlp_pairs(self.networks, ours.networks)
        for pass_on, heads, transfer in zip(self.passes, self.heads, ours.transfers, strict=True):
            yield pass_on.weight, transfer.pass_on.weight, lambda weight: weight
            yield pass_on.bias, transfer.pass_on.bias, lambda bias: bias
            for index, head in enumerate(heads):
                rows = slice(index * self.out_dim, (index + 1) * self.out_dim)
                yield head.weight, transfer.project.weight, lambda weight, rows=rows: weight[rows]


class EMM(nn.Module):
    """`models`, each with `task` and `widths`, are all of the same widths, cut after every layer, and read all of x."""

    def __init__(self, in_dim: int, num_tasks: int, models: Sequence[Any], one_input: bool) -> None:
        super().__init__()
        assert one_input
        self.tasks, dims = [model.task for model in models], [in_dim, *models[0].widths]
        self.num_tasks, self.out_dim, outers = num_tasks, dims[-1], dims[1:]
        self.components = nn.ModuleList(mlps(len(models), pair) for pair in zip(dims, outers, strict=False))
        self.gates, self.picks = (
            nn.ModuleList(
                nn.ModuleList(nn.Linear(inner, len(sees(task)), bias=False) for task in range(num_tasks))
                for inner in dims[:-1]
            )
            for sees in (self.own, lambda task: range(num_tasks))
        )
        self.merges = nn.ModuleList(  # Q, K and V of every task
            nn.ModuleList(nn.ModuleList(nn.Linear(d, d) for _ in range(3)) for _ in range(num_tasks)) for d in outers
        )

    def own(self, task: int) -> list[int]:
        return [model for model, of in enumerate(self.tasks) if of == task]

    def forward(self, x_BD: Tensor) -> list[Tensor]:
        z = [x_BD] * self.num_tasks
        for components, gates, picks, merges in zip(self.components, self.gates, self.picks, self.merges, strict=True):
            out = [component(z[task]) for component, task in zip(components, self.tasks, strict=True)]
            h = []
            for task, gate in enumerate(gates):
                h.append(mixed(gate(z[task]).softmax(1), torch.stack([out[m] for m in self.own(task)], 1)))
            new = []
            for task, (pick, (q, k, v)) in enumerate(zip(picks, merges, strict=True)):
                other = [t for t in range(self.num_tasks) if t != task]
                largest_B, index_B = pick(z[task]).softmax(1)[:, other].max(1)
                other_BTD = torch.stack([h[t] for t in other], 1)
                picked_BD = largest_B.unsqueeze(1) * other_BTD[torch.arange(len(index_B)), index_B]
                both = [h[task], picked_BD]
                scores = [(q(w_BD).relu() * k(w_BD).relu()).sum(1) / w_BD.shape[1] ** 0.5 for w_BD in both]
                share_B2 = torch.stack(scores, 1).softmax(1)
                new.append(share_B2[:, :1] * v(both[0]).relu() + share_B2[:, 1:] * v(both[1]).relu())
            z = new
        return z

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        for level, theirs in enumerate(ours.levels):
            for component, one in zip(self.components[level], theirs.components, strict=True):
                yield from mlp_pairs([component], one)
            for task in range(self.num_tasks):
                for linears, sees, stacked in (
                    (self.gates, self.own, theirs.gate),
                    (self.picks, lambda task: range(self.num_tasks), theirs.merge.gate),
                ):
                    columns = list(sees(task))
                    yield (
                        linears[level][task].weight, stacked.weight_SDH,
                        lambda weight_SDH, task=task, columns=columns: weight_SDH[task][:, columns].t(),
                    )  # fmt: skip
                for index, linear in enumerate(self.merges[level][task]):
                    part = slice(index * len(linear.bias), (index + 1) * len(linear.bias))
                    project = theirs.merge.project
                    yield (
                        linear.weight, project.weight_SDH,
                        lambda weight_SDH, task=task, part=part: weight_SDH[task][:, part].t(),
                    )  # fmt: skip
                    yield linear.bias, project.bias_SH, lambda bias_SH, task=task, part=part: bias_SH[task, part]


class Towers(nn.Module):
    """One a task, or, `shared`, one for all."""

    def __init__(self, num_tasks: int, in_dim: int, widths: Sequence[int], shared: bool) -> None:
        super().__init__()
        self.num_towers = 1 if shared else num_tasks
        self.hidden = mlps(self.num_towers, [in_dim, *widths])
        self.out = nn.ModuleList(nn.Linear(widths[-1], 1) for _ in range(self.num_towers))

    def forward(self, h: list[Tensor]) -> Tensor:
        which = [task % self.num_towers for task in range(len(h))]
        return torch.cat([self.out[i](self.hidden[i](h_BD)) for i, h_BD in zip(which, h, strict=True)], 1)

    def pairs(self, ours: nn.Module) -> Iterator[Pair]:
        ours = getattr(ours, "tower", ours)
        yield from mlp_pairs(self.hidden, ours.hidden)
        for task, linear in enumerate(self.out):
            yield from linear_pairs(linear, ours.out, task)
