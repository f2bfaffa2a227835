"""References of the flat fusions: single-task and shared networks, cross-stitch, MMoE, PLE, AdaTT and AITM (see layers.py)."""

# Shapes: B rows, T tasks, U units (the tasks, then the shared one), E experts a gate chooses from, D width.

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from references.layers import Pair, Reference, gate_network, gate_pairs, mixed, mlp_pairs, mlps
from torch import Tensor, nn

Levels = Sequence[Sequence[int]]
Options = Mapping[str, Any] | None  # of experts or of gates, as a config has them; None: linear and ReLU, linear
TaskExperts = int | Sequence[int] | Sequence[Sequence[int]]  # the same everywhere, by task, or by level and task
SharedExperts = int | Sequence[int]  # the same everywhere, or by level


class SharedBottom(Reference):
    """Caruana 1997: all tasks take the output of one network."""

    def __init__(self, in_dim: int, num_tasks: int, widths: Sequence[int], experts: Options = None) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        self.bottom = mlps(1, [in_dim, *widths], experts)

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        return [self.bottom[0](x_BD)] * self.num_tasks, []

    def pairs(self, module: Any) -> Iterator[Pair]:
        return mlp_pairs(self.bottom, module.bottom)


class SingleTask(Reference):
    """A network a task, and nothing between them."""

    def __init__(self, in_dim: int, num_tasks: int, widths: Sequence[int], experts: Options = None) -> None:
        super().__init__()
        self.out_dim = widths[-1]
        self.networks = mlps(num_tasks, [in_dim, *widths], experts)

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        return [network(x_BD) for network in self.networks], []

    def pairs(self, module: Any) -> Iterator[Pair]:
        return mlp_pairs(self.networks, module.networks)


class CrossStitch(Reference):
    """Misra et al. 2016, eq. 1: after each level x~_s = sum_t a_st x_t."""

    def __init__(self, in_dim: int, num_tasks: int, levels: Levels, experts: Options = None) -> None:
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, levels[-1][-1]
        dims = [in_dim, *(widths[-1] for widths in levels)]
        self.networks = nn.ModuleList(mlps(num_tasks, [d, *w], experts) for d, w in zip(dims, levels, strict=False))
        self.stitch_TT = nn.ParameterList(torch.rand(num_tasks, num_tasks) for _ in levels)

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        h = [x_BD] * self.num_tasks
        for networks, stitch_TT in zip(self.networks, self.stitch_TT, strict=True):
            out = [network(h_BD) for network, h_BD in zip(networks, h, strict=True)]
            h = [sum(share * out_BD for share, out_BD in zip(stitch_T, out, strict=True)) for stitch_T in stitch_TT]
        return h, []

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        return [stitch_TT.expand(len(x_BD), -1, -1) for stitch_TT in self.stitch_TT]

    def pairs(self, module: Any) -> Iterator[Pair]:
        for level, networks in enumerate(self.networks):
            yield from mlp_pairs(networks, module.networks[level])
            yield self.stitch_TT[level], module.stitch_LST, lambda stitch_LST, level=level: stitch_LST[level]


class MMoE(Reference):
    """Ma et al. 2018, eq. 6-8: f_t = sum_i g_t(x)_i e_i(x), g_t = softmax(W_t x).

    On several levels every expert above the first has a gate too, and all gates read the raw x (AdaTT, section 4.1).
    """

    def __init__(
        self,
        in_dim: int,
        num_tasks: int,
        num_experts: int,
        levels: Levels,
        experts: Options = None,
        gate: Options = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.out_dim = num_experts, levels[-1][-1]
        dims = [in_dim, *(widths[-1] for widths in levels)]
        users = [num_experts] * (len(levels) - 1) + [num_tasks]
        self.experts = nn.ModuleList(mlps(num_experts, [d, *w], experts) for d, w in zip(dims, levels, strict=False))
        self.gate = nn.ModuleList(
            nn.ModuleList(gate_network(in_dim, num_experts, **(gate or {})) for _ in range(count)) for count in users
        )

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        h, weights = [x_BD] * self.num_experts, []
        for experts, gates in zip(self.experts, self.gate, strict=True):
            expert_BED = torch.stack([expert(h_BD) for expert, h_BD in zip(experts, h, strict=True)], 1)
            weights.append([gate(x_BD).softmax(1) for gate in gates])
            h = [mixed(weight_BE, expert_BED) for weight_BE in weights[-1]]
        return h, weights

    def pairs(self, module: Any) -> Iterator[Pair]:
        for level, experts in enumerate(self.experts):
            yield from mlp_pairs(experts, module.experts[level])
            for user, gate in enumerate(self.gate[level]):
                yield from gate_pairs(gate, module.gate[level], user)


def unit_counts(num_tasks: int, task_experts: TaskExperts, shared_experts: SharedExperts, level: int) -> list[int]:
    """Experts of a level by unit: the first task's, the second's, …, and last the shared unit's, which may be 0."""
    counts = [task_experts] * num_tasks if isinstance(task_experts, int) else list(task_experts)
    if isinstance(counts[0], Sequence):
        counts = list(counts[level])
    return [*counts, shared_experts if isinstance(shared_experts, int) else shared_experts[level]]


class Units(Reference):
    """What PLE and AdaTT have in common: experts by unit, the shared unit last, and a gate each on the unit's own input.

    The shared unit mixes experts as long as there are shared ones on a level above.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels, task_experts: TaskExperts, shared_experts: SharedExperts,
        experts: Options = None, gate: Options = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_tasks, self.out_dim = num_tasks, levels[-1][-1]
        self.counts = [unit_counts(num_tasks, task_experts, shared_experts, level) for level in range(len(levels))]
        dims = [in_dim, *(widths[-1] for widths in levels)]
        self.experts = nn.ModuleList(
            nn.ModuleList(mlps(count, [d, *w], experts) for count in counts)
            for d, w, counts in zip(dims, levels, self.counts, strict=False)
        )
        self.givers = [num_tasks + any(above[-1] for above in self.counts[level + 1 :]) for level in range(len(levels))]
        self.gate = nn.ModuleList(
            nn.ModuleList(gate_network(dims[level], len(self.seen(level, u)), **(gate or {})) for u in range(givers))
            for level, givers in enumerate(self.givers)
        )

    def own(self, level: int, unit: int) -> range:
        """The unit's experts, as numbers among all of the level."""
        first = sum(self.counts[level][:unit])
        return range(first, first + self.counts[level][unit])

    def seen(self, level: int, unit: int) -> list[int]:
        """The experts that a unit's gate chooses from."""
        return list(range(sum(self.counts[level])))

    def mixtures(self, level: int, weights: list[Tensor], expert: list[Tensor]) -> list[Tensor]:
        """The next input of each unit, from its weight_BE and the outputs of all experts, (B, D) each."""
        raise NotImplementedError

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        h, weights = [x_BD] * (self.num_tasks + 1), []
        for level, (units, gates) in enumerate(zip(self.experts, self.gate, strict=True)):
            # Where nothing is shared any more, h ends before the shared unit, which has no experts.
            expert = [network(h_BD) for experts, h_BD in zip(units, h, strict=False) for network in experts]
            weights.append([gate(h_BD).softmax(1) for gate, h_BD in zip(gates, h, strict=False)])
            h = self.mixtures(level, weights[-1], expert)
        return h, weights

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Over all experts of the level: 0 on those that a gate does not see."""
        found = []
        for level, weights in enumerate(self.run(x_BD)[1]):
            weight_BUE = x_BD.new_zeros(len(x_BD), len(weights), sum(self.counts[level]))
            for unit, weight_BE in enumerate(weights):
                weight_BUE[:, unit, self.seen(level, unit)] = weight_BE
            found.append(weight_BUE)
        return found

    def pairs(self, module: Any) -> Iterator[Pair]:
        for level, units in enumerate(self.experts):
            for unit, experts in enumerate(units):
                yield from mlp_pairs(experts, module.levels[level].experts, self.own(level, unit).start)
            for unit, gate in enumerate(self.gate[level]):
                yield from gate_pairs(gate, module.levels[level].gate, unit, self.seen(level, unit))


class PLE(Units):
    """Tang et al. 2020, eq. 1-6: a task's gate sees its own and the shared experts, the shared gate all; CGC is one level."""

    def __init__(
        self,
        in_dim: int,
        num_tasks: int,
        levels: Levels,
        task_experts: TaskExperts = 1,
        shared_experts: SharedExperts = 1,
        experts: Options = None,
        gate: Options = None,
    ) -> None:
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, experts, gate)

    def seen(self, level: int, unit: int) -> list[int]:
        if unit == self.num_tasks:
            return super().seen(level, unit)
        return [*self.own(level, unit), *self.own(level, self.num_tasks)]

    def mixtures(self, level: int, weights: list[Tensor], expert: list[Tensor]) -> list[Tensor]:
        return [
            mixed(weight_BE, torch.stack([expert[e] for e in self.seen(level, unit)], 1))
            for unit, weight_BE in enumerate(weights)
        ]


class AdaTT(Units):
    """Li et al. 2023, eq. 2-10 and section 3.2: f_u = (pad(v_u) + softmax(W_u f_u)) E; v = 1 where a unit has one expert.

    native: "published": v = 1 only at levels where all units have one expert; False: no v.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels, task_experts: TaskExperts, shared_experts: SharedExperts,
        native: bool | str = True, experts: Options = None, gate: Options = None,
    ) -> None:  # fmt: skip
        super().__init__(in_dim, num_tasks, levels, task_experts, shared_experts, experts, gate)
        self.native = native
        self.native_1E = nn.ModuleList(
            nn.ParameterList(torch.rand(1, counts[unit]) for unit in range(givers))
            for counts, givers in zip(self.counts, self.givers, strict=True)
        )

    def learnt(self, level: int, unit: int) -> bool:
        """Whether the unit's v is learnt."""
        units = self.counts[level] if any(n[-1] for n in self.counts[level:]) else self.counts[level][:-1]
        if self.native == "published":
            return len(self.own(level, unit)) > 0 and units != [1] * len(units)
        return bool(self.native) and len(self.own(level, unit)) > 1

    def mixtures(self, level: int, weights: list[Tensor], expert: list[Tensor]) -> list[Tensor]:
        expert_BED, h = torch.stack(expert, 1), []
        for unit, weight_BE in enumerate(weights):
            h.append(mixed(weight_BE, expert_BED))
            if own := self.own(level, unit) if self.native else ():
                own_BED = torch.stack([expert[e] for e in own], 1)
                native_1E = self.native_1E[level][unit]
                h[-1] = h[-1] + (
                    torch.matmul(native_1E, own_BED).squeeze(1) if self.learnt(level, unit) else own_BED.sum(1)
                )
        return h

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """With the native weights."""
        found = super().gates(x_BD)
        for level, weight_BUE in enumerate(found):
            for unit in range(weight_BUE.shape[1] if self.native else 0):
                own = self.own(level, unit)
                weight_BUE[:, unit, own.start : own.stop] += (
                    self.native_1E[level][unit] if self.learnt(level, unit) else 1
                )
        return found

    def pairs(self, module: Any) -> Iterator[Pair]:
        yield from super().pairs(module)
        for level, natives in enumerate(self.native_1E):
            for unit, native_1E in enumerate(natives):
                own = self.own(level, unit)
                if self.learnt(level, unit):  # else it is 1
                    part = slice(own.start, own.stop)
                    weight = module.levels[level].native_OE
                    yield native_1E, weight, lambda native_OE, unit=unit, part=part: native_OE[unit : unit + 1, part]


class AITM(Reference):
    """Xi et al. 2021: z_1 = q_1; p = relu(G z_(t-1) + c); z_t = sum_u w_u h1(u), w = softmax(<h2(u), h3(u)> / sqrt(D)).

    A task outside of the chain takes the output of its own network.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, widths: Sequence[int], chain: Sequence[int] | None = None,
        experts: Options = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_dim = dim = widths[-1]
        self.chain = range(num_tasks) if chain is None else chain
        self.networks = mlps(num_tasks, [in_dim, *widths], experts)
        self.passes = nn.ModuleList(nn.Linear(dim, dim) for _ in self.chain[1:])
        self.heads = nn.ModuleList(  # h1, h2, h3
            nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3)) for _ in self.chain[1:]
        )

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        q = [network(x_BD) for network in self.networks]
        z, weights = {task: q_BD for task, q_BD in enumerate(q) if task not in self.chain[1:]}, []
        for (before, task), pass_on, (h1, h2, h3) in zip(pairwise(self.chain), self.passes, self.heads, strict=True):
            p_BD = torch.relu(pass_on(z[before]))
            scores = [(h2(u_BD) * h3(u_BD)).sum(1) / self.out_dim**0.5 for u_BD in (p_BD, q[task])]
            weight_B2 = torch.stack(scores, 1).softmax(1)
            z[task] = weight_B2[:, :1] * h1(p_BD) + weight_B2[:, 1:] * h1(q[task])
            weights.append(weight_B2)
        return [z[task] for task in range(len(q))], [weights]

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """weight_BTT: of itself and of the task before it; 1 of itself where there is none before it."""
        count = len(self.networks)
        weight_BTT = x_BD.new_zeros(len(x_BD), count, count)
        for task in set(range(count)) - set(self.chain[1:]):
            weight_BTT[:, task, task] = 1
        for (before, task), weight_B2 in zip(pairwise(self.chain), self.run(x_BD)[1][0], strict=True):
            weight_BTT[:, task, before], weight_BTT[:, task, task] = weight_B2.unbind(1)
        return [weight_BTT]

    def pairs(self, module: Any) -> Iterator[Pair]:
        yield from mlp_pairs(self.networks, module.networks)
        for pass_on, heads, transfer in zip(self.passes, self.heads, module.transfers, strict=True):
            yield pass_on.weight, transfer.pass_on.weight, lambda weight: weight
            yield pass_on.bias, transfer.pass_on.bias, lambda bias: bias
            for index, head in enumerate(heads):
                rows = slice(index * self.out_dim, (index + 1) * self.out_dim)
                yield head.weight, transfer.project.weight, lambda weight, rows=rows: weight[rows]


def calibrator(logit_BT: Tensor, chain: Sequence[int], weight: float, given: Mapping[int, int] | None = None) -> Tensor:
    """Xi et al. 2021: weight * sum_t max(p_t - p_(t-1), 0) along the chain: loss_B.

    Args:
        given: of a task, the task under which alone it is defined: its p is the product with that one's.
    """
    losses = []
    for logit_T in logit_BT:
        p = []
        for task in chain:
            p.append(1 / (1 + torch.exp(-logit_T[task])))
            while task in (given or {}):
                task = given[task]
                p[-1] = p[-1] / (1 + torch.exp(-logit_T[task]))
        loss = logit_T.new_zeros(())
        for before, after in pairwise(p):
            if after > before:
                loss = loss + weight * (after - before)
        losses.append(loss)
    return torch.stack(losses)
