"""Twins of the models: float64, one row, task, expert and layer at a time, written from the equations.

Of the modules they know the names and shapes of the parameters, nothing else. Each takes the parameters by name, so
that autograd through a twin gives gradients of the very tensors that the module holds.
"""

# Shapes: B rows, T tasks, U units (the tasks, then the shared one), S networks, E experts, D width in, H width out.

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Levels = Sequence[Sequence[int]]
TaskExperts = int | Sequence[int] | Sequence[Sequence[int]]  # the same everywhere, by task, or by level and task
SharedExperts = int | Sequence[int]  # the same everywhere, or by level
Fused = tuple[Tensor, list[Tensor]]  # h_BTD and, for every level, the weights (B, U, E)


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


def gate(weight_DE: Tensor, x_D: Tensor, seen: Sequence[int]) -> list[Tensor]:
    """Softmax over the experts that are seen; the others get 0."""
    weights = [x_D.new_zeros(())] * weight_DE.shape[1]
    for expert, share in zip(seen, softmax([x_D @ weight_DE[:, expert] for expert in seen]), strict=True):
        weights[expert] = share
    return weights


def mix(weight_E: Sequence[Tensor], expert_ED: Sequence[Tensor]) -> Tensor:
    """sum_i w_i E_i."""
    total_D = torch.zeros_like(expert_ED[0])
    for weight, expert_D in zip(weight_E, expert_ED, strict=True):
        total_D = total_D + weight * expert_D
    return total_D


def by_row(row: Callable[[Tensor], tuple[list[Tensor], list[list[list[Tensor]]]]], x_BD: Tensor) -> Fused:
    """Runs `row` (x_D -> T vectors, and for every level U lists of E weights) on each row and stacks what it gives."""
    rows = [row(x_D) for x_D in x_BD]
    h_BTD = torch.stack([torch.stack(h_TD) for h_TD, _ in rows])
    levels = range(len(rows[0][1]))
    gates = [
        torch.stack([torch.stack([torch.stack(weight_E) for weight_E in weights[level]]) for _, weights in rows])
        for level in levels
    ]
    return h_BTD, gates


def shared_bottom(params: Params, x_BD: Tensor, num_tasks: int, widths: Sequence[int]) -> Tensor:
    """Caruana 1997: all tasks take what one network makes."""
    rows = [[mlp(params, "bottom.", 0, len(widths), x_D) for _ in range(num_tasks)] for x_D in x_BD]
    return torch.stack([torch.stack(h_TD) for h_TD in rows])


def mmoe(params: Params, x_BD: Tensor, num_tasks: int, num_experts: int, levels: Levels) -> Fused:
    """Ma et al. 2018: f_t = sum_i g_t(x)_i e_i(x); on several levels every expert above the first mixes its own input.

    All gates read the raw x (AdaTT, section 4.1).
    """

    def row(x_D: Tensor) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
        input_ED = [x_D] * num_experts
        gates = []
        for level, widths in enumerate(levels):
            expert_ED = [mlp(params, f"experts.{level}.", e, len(widths), input_ED[e]) for e in range(num_experts)]
            takers = num_tasks if level == len(levels) - 1 else num_experts
            weight_UDE = params[f"gate.{level}.weight_SDH"]
            gates.append([gate(weight_UDE[u], x_D, range(num_experts)) for u in range(takers)])
            input_ED = [mix(weight_E, expert_ED) for weight_E in gates[-1]]
        return input_ED, gates

    return by_row(row, x_BD)


def owned(num_tasks: int, task_experts: TaskExperts, shared_experts: SharedExperts, level: int = 0) -> list[list[int]]:
    """Experts of a level by unit: the first task's, the second's, …, and last the shared unit's, which may be none."""
    counts = [task_experts] * num_tasks if isinstance(task_experts, int) else list(task_experts)
    if isinstance(counts[0], Sequence):
        counts = list(counts[level])
    counts.append(shared_experts if isinstance(shared_experts, int) else shared_experts[level])
    experts, first = [], 0
    for count in counts:
        experts.append([first + i for i in range(count)])
        first += count
    return experts


def unit_experts(params: Params, level: int, depth: int, own: list[list[int]], f_UD: list[Tensor]) -> list[Tensor]:
    """E_{u,i} = e_{u,i}(f_u): each unit's experts on the unit's own representation."""
    expert_ED = []
    for experts, f_D in zip(own, f_UD, strict=False):  # where nothing is shared any more, the shared unit has ended
        expert_ED += [mlp(params, f"levels.{level}.experts.", e, depth, f_D) for e in experts]
    return expert_ED


def cgc(params: Params, x_BD: Tensor, num_tasks: int, widths: Sequence[int], task_experts: int, shared: int) -> Tensor:
    """Tang et al. 2020, customised gate control: g_k = w_k(x) S_k, the task's experts stacked on the shared ones."""
    total = num_tasks * task_experts + shared
    weight_TDE = params["levels.0.gate.weight_SDH"]
    rows = []
    for x_D in x_BD:
        g_TD = []
        for k in range(num_tasks):
            chosen = [*range(k * task_experts, (k + 1) * task_experts), *range(total - shared, total)]
            S_ED = torch.stack([mlp(params, "levels.0.experts.", e, len(widths), x_D) for e in chosen])
            W_DE = torch.stack([weight_TDE[k, :, e] for e in chosen], dim=1)
            w_E = torch.stack(softmax(list(x_D @ W_DE)))
            g_TD.append(w_E @ S_ED)
        rows.append(torch.stack(g_TD))
    return torch.stack(rows)


def ple(
    params: Params,
    x_BD: Tensor,
    num_tasks: int,
    levels: Levels,
    task_experts: TaskExperts,
    shared_experts: SharedExperts,
) -> Fused:
    """Tang et al. 2020: CGC upon CGC; a task's gate reads its representation, the shared gate the shared one.

    The shared gate mixes the experts of all tasks and the shared ones; there is none where no shared expert is above.
    """
    own_L = [owned(num_tasks, task_experts, shared_experts, level) for level in range(len(levels))]

    def row(x_D: Tensor) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
        f_UD = [x_D] * (num_tasks + 1)
        gates = []
        for level, widths in enumerate(levels):
            own = own_L[level]
            expert_ED = unit_experts(params, level, len(widths), own, f_UD)
            weight_UDE = params[f"levels.{level}.gate.weight_SDH"]
            weights = [gate(weight_UDE[t], f_UD[t], own[t] + own[num_tasks]) for t in range(num_tasks)]
            if any(above[num_tasks] for above in own_L[level + 1 :]):
                weights.append(gate(weight_UDE[num_tasks], f_UD[num_tasks], range(len(expert_ED))))
            f_UD = [mix(weight_E, expert_ED) for weight_E in weights]
            gates.append(weights)
        return f_UD, gates

    return by_row(row, x_BD)


def adatt(
    params: Params,
    x_BD: Tensor,
    num_tasks: int,
    levels: Levels,
    task_experts: TaskExperts,
    shared_experts: SharedExperts,
    native: bool,
) -> Fused:
    """Li et al. 2023, eq. 2-10 and section 3.2: f_u = (pad(v_u) + softmax(W_u f_u)) E.

    A unit with one expert has v = 1; at the last level with shared experts the shared unit only makes experts.
    """
    own_L = [owned(num_tasks, task_experts, shared_experts, level) for level in range(len(levels))]

    def row(x_D: Tensor) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
        f_UD = [x_D] * (num_tasks + 1)
        gates = []
        for level, widths in enumerate(levels):
            own = own_L[level]
            expert_ED = unit_experts(params, level, len(widths), own, f_UD)
            weights = []
            for u in range(num_tasks + any(above[num_tasks] for above in own_L[level + 1 :])):
                weight_DE = params[f"levels.{level}.gate.weight_SDH"][u]
                weight_E = gate(weight_DE, f_UD[u], range(len(expert_ED)))
                if native and len(own[u]) == 1:
                    weight_E[own[u][0]] = weight_E[own[u][0]] + 1
                elif native:
                    for e in own[u]:
                        weight_E[e] = weight_E[e] + params[f"levels.{level}.native_OE"][u, e]
                weights.append(weight_E)
            f_UD = [mix(weight_E, expert_ED) for weight_E in weights]
            gates.append(weights)
        return f_UD, gates

    return by_row(row, x_BD)


def towers(params: Params, h_BTD: Tensor, widths: Sequence[int]) -> Tensor:
    """A network a task; the layer to the logit is not rectified."""
    rows = []
    for h_TD in h_BTD:
        logits = []
        for t, h_D in enumerate(h_TD):
            hidden_D = mlp(params, "hidden.", t, len(widths), h_D)
            logits.append(hidden_D @ params["out.weight_SDH"][t, :, 0] + params["out.bias_SH"][t, 0])
        rows.append(torch.stack(logits))
    return torch.stack(rows)
