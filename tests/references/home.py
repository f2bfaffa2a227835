"""Reference of HoME: one row, unit and expert at a time, parameters by name (see loops.py)."""

# Shapes: B rows, D width in, H width of a layer, E experts of a level, N experts of a category, 1 a single number.

from collections.abc import Mapping, Sequence

import torch
from references.loops import Params, mix, softmax
from torch import Tensor

EPS = 1e-5  # of layer normalisation


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def expert(params: Params, prefix: str, network: int, depth: int, x_D: Tensor) -> Tensor:
    """Swish(scale * (y - mean) / sqrt(var + eps) + shift), y = x W + b, layer after layer."""
    for layer in range(depth):
        own = f"{prefix}experts.{layer}."
        y_H = x_D @ params[f"{own}linear.weight_SDH"][network] + params[f"{own}linear.bias_SH"][network]
        mean = sum(y_H) / len(y_H)
        variance = sum((y - mean) ** 2 for y in y_H) / len(y_H)
        normed_H = (y_H - mean) / (variance + EPS) ** 0.5
        z_H = normed_H * params[f"{own}scale_S1H"][network, 0] + params[f"{own}shift_S1H"][network, 0]
        x_D = z_H * sigmoid(z_H)
    return x_D


def scaled(params: Params, prefix: str, category: int, loras: int, x_D: Tensor) -> Tensor:
    """x * sum_l softmax(x W)_l 2 sigmoid(x B_l A_l)."""
    own = f"{prefix}feature_gates."
    choice = softmax(list(x_D @ params[f"{own}choice.weight_SDH"][category])) if loras > 1 else [1]
    scale_D = torch.zeros_like(x_D)
    for lora, weight in enumerate(choice):
        place = category * loras + lora
        low = x_D @ params[f"{own}down.weight_SDH"][place]
        scale_D = scale_D + weight * 2 * sigmoid(low @ params[f"{own}up.weight_SDH"][place])
    return x_D * scale_D


def unit(
    params: Params, prefix: str, number: int, seen: Sequence[int], experts: Mapping[int, list[Tensor]], gate_D: Tensor,
    own_D: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """What a unit gives, and its weight of every expert of the level.

    Args:
        seen: the categories that its gate chooses from. experts: outputs by category, of all.
        gate_D: what its gate reads. own_D: what its self gate reads, of category `number`.
    """
    count = len(experts[0])
    score_E = gate_D @ params[f"{prefix}gate.weight_SDH"][number]
    places = [category * count + n for category in sorted(seen) for n in range(count)]
    weight = dict.fromkeys(range(count * len(experts)), torch.zeros_like(score_E[0]))
    weight |= dict(zip(places, softmax([score_E[place] for place in places]), strict=True))
    score_N = own_D @ params[f"{prefix}self_gate.weight_SDH"][number]
    own_N = softmax(list(score_N)) if count > 1 else [sigmoid(score_N[0])]
    for n, more in enumerate(own_N):
        weight[number * count + n] = weight[number * count + n] + more
    outputs = [output for category in range(len(experts)) for output in experts[category]]
    return mix([weight[place] for place in range(len(outputs))], outputs), [*weight.values()]


def home(
    params: Params, x_BD: Tensor, groups: Sequence[Sequence[int]], depths: Sequence[int], count: int, loras: int
) -> tuple[Tensor, list[Tensor]]:
    """h_BTH, and of both levels the weights: of each task's group, then of the shared unit; of each task.

    Args:
        groups: tasks of each. depths: layers of an expert at both levels. count: experts of a category.
        loras: of a feature gate.
    """
    shared, tasks = len(groups), sum(map(len, groups))
    of_task = {task: g for g, group in enumerate(groups) for task in group}

    def category(prefix: str, number: int, depth: int, x_D: Tensor) -> list[Tensor]:
        read_D = scaled(params, prefix, number, loras, x_D)
        return [expert(params, prefix, number * count + n, depth, read_D) for n in range(count)]

    outputs, first, second = [], [], []
    for x_D in x_BD:
        experts = {c: category("of_groups.", c, depths[0], x_D) for c in range(shared + 1)}
        z, weights = {}, {}
        for u in range(shared + 1):
            seen = range(shared + 1) if u == shared else [u, shared]
            z[u], weights[u] = unit(params, "of_groups.", u, seen, experts, x_D, x_D)
        first.append([weights[of_task[t]] for t in range(tasks)] + [weights[shared]])
        reads = {t: z[of_task[t]] for t in range(tasks)} | {tasks + g: z[g] for g in range(shared + 1)}
        experts = {c: category("of_tasks.", c, depths[1], reads[c]) for c in range(tasks + shared + 1)}
        found = []
        for t in range(tasks):
            seen = [t, tasks + of_task[t], tasks + shared]
            gate_D = torch.cat([reads[t], z[shared]])
            found.append(unit(params, "of_tasks.", t, seen, experts, gate_D, reads[t]))
        outputs.append(torch.stack([h_H for h_H, _ in found]))
        second.append([weight for _, weight in found])
    gates = [torch.stack([torch.stack([torch.stack(w) for w in row]) for row in level]) for level in (first, second)]
    return torch.stack(outputs), gates
