"""Reference of AutoMTL: one row, expert, candidate and place at a time, parameters by name (see loops.py).

Operations are those of the paper's table 1, by name: mlp_4 is kind mlp and size 4. The paper leaves open how outputs of unlike
width are mixed; that is as the docstrings of models/automtl say.
"""

# Shapes: B rows, T tasks, D width in, F features, W width of a token, M heads, V = W / M, H width of every block, K hidden
# columns, N experts, L blocks of an expert, O candidates of a block.

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from references.loops import Params, mix, mlp, softmax
from torch import Tensor


class Space(NamedTuple):
    """What a supernet is built for. selection: "beta" or "gates"."""

    columns: Sequence[Sequence[int]]
    tasks: int
    experts: int
    depth: int
    interaction: Sequence[str]
    blocks: Sequence[str]
    nested: bool = True
    homogeneous: bool = False
    selection: str = "beta"
    auxiliary: float = 0.0
    sharpness: float = 1.0


def kind(name: str) -> str:
    return name.split("_")[0]


def sizes(names: Sequence[str], of: str) -> list[int]:
    """Sizes of the candidates of a kind, in order."""
    return [int(name.split("_")[1]) for name in names if kind(name) == of]


def columns_of(widths: Sequence[int], width: int, nested: bool) -> range:
    """Hidden columns of an MLP of this width: the first of all, or those behind the narrower candidates before it."""
    first = 0 if nested else sum(widths[: widths.index(width)])
    return range(first, first + width)


def perceptron(params: Params, prefix: str, s: int, columns: Sequence[int], x_D: Tensor) -> Tensor:
    """b2 + sum_k relu(x . W1_k + b1_k) W2_k."""
    y_H = params[f"{prefix}out.bias_SH"][s]
    for k in columns:
        z = params[f"{prefix}hidden.bias_SH"][s][k] + x_D @ params[f"{prefix}hidden.weight_SDH"][s][:, k]
        y_H = y_H + z.relu() * params[f"{prefix}out.weight_SDH"][s][k]
    return y_H


def gating(params: Params, prefix: str, s: int, x_H: Tensor) -> Tensor:
    """Number by number x_h / (1 + exp(-z)), z = x . W_h + b_h; below 0 as x_h exp(z) / (1 + exp(z)), lest it overflow."""
    numbers = []
    for h in range(len(x_H)):
        z = params[f"{prefix}gate.bias_SH"][s][h] + x_H @ params[f"{prefix}gate.weight_SDH"][s][:, h]
        numbers.append(x_H[h] * z.exp() / (1 + z.exp()) if z < 0 else x_H[h] / (1 + (-z).exp()))
    return torch.stack(numbers)


def convolution(params: Params, prefix: str, s: int, widths: Sequence[int], width: int, x_H: Tensor) -> Tensor:
    """y_j = relu(b + sum over places i of the kernel w_i x_(j + i)), i from its middle; beyond the ends x is 0."""
    c, middle = widths.index(width), max(widths) // 2
    kernel_K, numbers = params[f"{prefix}kernel_SCK"][s][c], []
    for j in range(len(x_H)):
        y = params[f"{prefix}bias_SC"][s][c]
        for i in range(-(width // 2), width // 2 + 1):
            if 0 <= j + i < len(x_H):
                y = y + kernel_K[middle + i] * x_H[j + i]
        numbers.append(y.relu())
    return torch.stack(numbers)


def operation(
    params: Params, prefix: str, names: Sequence[str], name: str, s: int, nested: bool, x_H: Tensor
) -> Tensor:
    """o(x) of expert s. prefix: of the kind's parameters. names: all candidates."""
    of, widths = kind(name), sizes(names, kind(name)) if "_" in name else []
    if of == "mlp":
        return perceptron(params, prefix, s, columns_of(widths, int(name[4:]), nested), x_H)
    if of == "conv":
        return convolution(params, prefix, s, widths, int(name[5:]), x_H)
    return gating(params, prefix, s, x_H) if of == "gating" else x_H


def block(
    params: Params, prefix: str, names: Sequence[str], s: int, nested: bool, weight_O: Sequence[Tensor], x_H: Tensor
) -> Tensor:
    """B(x) = sum_o w_o o(x), section 3.4.1."""
    total_H = torch.zeros_like(x_H)
    for weight, name in zip(weight_O, names, strict=True):
        total_H = total_H + weight * operation(params, f"{prefix}kinds.{kind(name)}.", names, name, s, nested, x_H)
    return total_H


def tokens(params: Params, prefix: str, columns: Sequence[Sequence[int]], x_D: Tensor) -> list[Tensor]:
    """Of each feature its columns through a linear layer of its own."""
    found = []
    for f, own in enumerate(columns):
        token_W = params[f"{prefix}tokens.linear.bias_SH"][f]
        for p, column in enumerate(own):
            token_W = token_W + x_D[column] * params[f"{prefix}tokens.linear.weight_SDH"][f][p]
        found.append(token_W)
    return found


def product(params: Params, prefix: str, which: str, token_FW: Sequence[Tensor], x_D: Tensor) -> Tensor:
    """W_z x + b + W_p p: p the inner products of all pairs, or the sum of all outer ones, pair by pair."""
    if which == "inner":
        numbers = [a @ b for f, a in enumerate(token_FW) for b in token_FW[f + 1 :]]
    else:
        total_WW = torch.zeros(len(token_FW[0]), len(token_FW[0]), dtype=x_D.dtype)
        for a in token_FW:
            for b in token_FW:
                total_WW = total_WW + torch.outer(a, b)
        numbers = [number for row in total_WW for number in row]
    y_H = params[f"{prefix}input.weight"] @ x_D + params[f"{prefix}input.bias"]
    for p, number in enumerate(numbers):
        y_H = y_H + number * params[f"{prefix}products.{which}.weight"][:, p]
    return y_H


def cross(params: Params, prefix: str, depth: int, x_D: Tensor) -> Tensor:
    """DCN, eq. 3: x_(l+1) = x_0 x_l^T w_l + b_l + x_l, with the outer product as it is written there."""
    layer_D = x_D
    for level in range(depth):
        crossed_D = torch.outer(x_D, layer_D) @ params[f"{prefix}weight_LD"][level]
        layer_D = crossed_D + params[f"{prefix}bias_LD"][level] + layer_D
    return params[f"{prefix}out.weight"] @ layer_D + params[f"{prefix}out.bias"]


def attention(params: Params, prefix: str, heads: int, token_FW: Sequence[Tensor]) -> Tensor:
    """W (t_f + concat over heads of sum_g softmax_g(q_f . k_g / sqrt(V)) v_g) + b."""
    width = len(token_FW[0])
    weight_NW, size = params[f"{prefix}projection.weight"], width // heads
    query_FW, key_FW, value_FW = (
        [weight_NW[n * width : (n + 1) * width] @ token_W for token_W in token_FW] for n in range(3)
    )
    flat = []
    for f, token_W in enumerate(token_FW):
        parts = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            weight_F = softmax([query_FW[f][own] @ key_W[own] / math.sqrt(size) for key_W in key_FW])
            parts.append(mix(weight_F, [value_W[own] for value_W in value_FW]))
        flat.append(token_W + torch.cat(parts))
    return params[f"{prefix}out.weight"] @ torch.cat(flat) + params[f"{prefix}out.bias"]


def interaction(
    params: Params, prefix: str, names: Sequence[str], name: str, columns: Sequence[Sequence[int]], nested: bool,
    x_D: Tensor,
) -> Tensor:  # fmt: skip
    """One candidate of the feature interaction. prefix: of its block."""
    own, of = f"{prefix}kinds.{kind(name)}.", kind(name)
    if of == "mlp":
        return perceptron(params, f"{own}mlp.", 0, columns_of(sizes(names, "mlp"), int(name[4:]), nested), x_D)
    if of == "cross":
        return cross(params, own, int(name[6:]), x_D)
    if of == "skip":
        return params[f"{own}out.weight"] @ x_D + params[f"{own}out.bias"]
    token_FW = tokens(params, prefix, columns, x_D)
    if of == "attention":
        return attention(params, own, int(name[10:]), token_FW)
    return product(params, own, name[8:], token_FW, x_D)


def gate(params: Params, task: int, chosen: Sequence[int], depth: int, h_H: Tensor) -> list[Tensor]:
    """softmax over the chosen experts of W h + b, above `depth` hidden layers."""
    h_H = mlp(params, "gate.hidden.", task, depth, h_H)
    score_N = h_H @ params["gate.weight_SDH"][task]
    if "gate.bias_SH" in params:
        score_N = score_N + params["gate.bias_SH"][task]
    return softmax([score_N[n] for n in chosen])


def supernet(params: Params, x_BD: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """h_BTH and the weights of experts weight_BTN."""
    outputs, weights = [], []
    weight_I = softmax([space.sharpness * a for a in params["alpha_I"]])
    for x_D in x_BD:
        parts = [
            interaction(params, "interaction.", space.interaction, name, space.columns, space.nested, x_D)
            for name in space.interaction
        ]
        input_H = mix(weight_I, parts)
        if "skip" in space.interaction:
            input_H = input_H + space.auxiliary * parts[space.interaction.index("skip")]
        expert_NH = []
        for s in range(space.experts):
            h_H = input_H
            for level in range(space.depth):
                alpha_O = params["alpha_NLO"][0 if space.homogeneous else s][level]
                weight_O = softmax([space.sharpness * a for a in alpha_O])
                y_H = block(params, f"blocks.{level}.", space.blocks, s, space.nested, weight_O, h_H)
                h_H = y_H + space.auxiliary * h_H
            expert_NH.append(h_H)
        weight_TN = [
            softmax(list(params["beta_TN"][task]))
            if space.selection == "beta"
            else gate(params, task, range(space.experts), 0, input_H)
            for task in range(space.tasks)
        ]
        outputs.append(torch.stack([mix(weight_N, expert_NH) for weight_N in weight_TN]))
        weights.append(torch.stack([torch.stack(weight_N) for weight_N in weight_TN]))
    return torch.stack(outputs), torch.stack(weights)


def sampled(
    params: Params, x_BD: Tensor, space: Space, chosen: int, chosen_NL: Sequence[Sequence[int]], weight: Tensor,
    weight_NL: Tensor,
) -> Tensor:  # fmt: skip
    """h_BTH of one candidate a block, each times a number; beta selects experts.

    Args:
        weight, weight_NL: 1 in the forward; their gradients are those that `straight_through` passes on to alpha.
    """
    outputs = []
    for x_D in x_BD:
        name, inner = space.interaction[chosen], (space.interaction, space.columns, space.nested)
        input_H = weight * interaction(params, "interaction.", inner[0], name, inner[1], inner[2], x_D)
        if "skip" in space.interaction and space.auxiliary:
            skip_H = interaction(params, "interaction.", inner[0], "skip", inner[1], inner[2], x_D)
            input_H = input_H + space.auxiliary * skip_H
        expert_NH = []
        for s in range(space.experts):
            h_H = input_H
            for level in range(space.depth):
                name = space.blocks[chosen_NL[s][level]]
                prefix = f"blocks.{level}.kinds.{kind(name)}."
                y_H = operation(params, prefix, space.blocks, name, s, space.nested, h_H)
                h_H = weight_NL[s][level] * y_H + space.auxiliary * h_H
            expert_NH.append(h_H)
        rows = [mix(softmax(list(params["beta_TN"][task])), expert_NH) for task in range(space.tasks)]
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def straight_through(
    alpha_O: Tensor, noise_O: Tensor, temperature: float, chosen: int, gradient: Tensor
) -> list[Tensor]:
    """The gradient of alpha, from that of the chosen candidate's weight.

    The weight is 1 with the derivative of s_c = softmax((alpha + noise) / temperature)_c: d s_c / d alpha_o = s_c ([o = c] -
    s_o) / temperature. Candidates that were not computed have no part in the output.
    """
    soft_O = softmax([(a + g) / temperature for a, g in zip(alpha_O, noise_O, strict=True)])
    return [gradient * soft_O[chosen] * (float(o == chosen) - soft_O[o]) / temperature for o in range(len(soft_O))]


def negative_divergence(beta_TN: Tensor) -> Tensor:
    """Eq. 2: sum_i m_i log m_i - (1 / K) sum_k sum_i p_i^(k) log p_i^(k)."""
    p_TN = [softmax(list(beta_N)) for beta_N in beta_TN]
    total = torch.zeros((), dtype=beta_TN.dtype)
    for i in range(len(p_TN[0])):
        m = sum(p_N[i] for p_N in p_TN) / len(p_TN)
        total = total + m * m.log() - sum(p_N[i] * p_N[i].log() for p_N in p_TN) / len(p_TN)
    return total


def derived(
    params: Params, x_BD: Tensor, columns: Sequence[Sequence[int]], chosen: str, experts: Sequence[Sequence[str]],
    tasks: Sequence[Sequence[int]], gate_depth: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a search found (section 3.2): h_BTH, and weight_BTN over the experts that some task has, in order.

    Args:
        chosen: the interaction. experts: of each the operations of its blocks. tasks: of each its experts, from 1.
    """
    used = [n for n in range(1, len(experts) + 1) if any(n in numbers for numbers in tasks)]
    outputs, weights = [], []
    for x_D in x_BD:
        input_H = interaction(params, "interaction.", [chosen], chosen, columns, True, x_D)
        expert_H: Mapping[int, Tensor] = {n: expert(params, experts, used, n, input_H) for n in used}
        rows, shares = [], []
        for task, numbers in enumerate(tasks):
            weight = dict(
                zip(numbers, gate(params, task, [used.index(n) for n in numbers], gate_depth, input_H), strict=True)
            )
            rows.append(mix(list(weight.values()), [expert_H[n] for n in numbers]))
            shares.append(torch.stack([weight.get(n, torch.zeros((), dtype=x_D.dtype)) for n in used]))
        outputs.append(torch.stack(rows))
        weights.append(torch.stack(shares))
    return torch.stack(outputs), torch.stack(weights)


def expert(params: Params, experts: Sequence[Sequence[str]], used: Sequence[int], number: int, h_H: Tensor) -> Tensor:
    """Block after block; in a block the experts of one operation are one stack, in order."""
    for level, name in enumerate(experts[number - 1]):
        alike = [n for n in used if experts[n - 1][level] == name]
        prefix = f"blocks.{level}.operations.{name}."
        h_H = operation(params, prefix, [name], name, alike.index(number), True, h_H)
    return h_H


def within(
    budget: float, log_BO: Sequence[Sequence[float]], cost_BO: Sequence[Sequence[float]], choice_B: Sequence[int]
) -> list[int] | None:
    """Choices of blocks within a budget: candidates replaced one by one, that of the least log strength lost per cost saved.

    None: there are none. Of equal prices that of the first block and candidate.
    """
    choice = list(choice_B)
    while sum(cost[o] for cost, o in zip(cost_BO, choice, strict=True)) > budget:
        prices = []
        for block, (log_O, cost_O) in enumerate(zip(log_BO, cost_BO, strict=True)):
            for o, cost in enumerate(cost_O):
                saved = cost_O[choice[block]] - cost
                if saved > 0:
                    prices.append(((log_O[choice[block]] - log_O[o]) / saved, block, o))
        if not prices:
            return None
        _, block, o = min(prices)
        choice[block] = o
    return choice
