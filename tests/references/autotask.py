"""Reference of AutoTask: float64, one example, place and head at a time, written from the equations of GPT-2 and the paper.

Of the module it knows the names and shapes of the parameters, nothing else.
"""

# Shapes: T tasks, F features, D width of a token, I width of a task id, K tasks of a block, S places, W width in attention.

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Example = tuple[int, int]  # a row and a task of it


def linear(params: Params, prefix: str, x_D: Tensor) -> Tensor:
    """y = W x + b."""
    return params[f"{prefix}.weight"] @ x_D + params[f"{prefix}.bias"]


def layer_norm(params: Params, prefix: str, x_W: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5), scaled and shifted."""
    mean = x_W.sum() / len(x_W)
    variance = ((x_W - mean) ** 2).sum() / len(x_W)
    return (x_W - mean) / torch.sqrt(variance + 1e-5) * params[f"{prefix}.weight"] + params[f"{prefix}.bias"]


def gelu(x_W: Tensor) -> Tensor:
    """x times the probability that a normal number is below x."""
    return x_W * (1 + torch.erf(x_W / math.sqrt(2))) / 2


def gpt_block(
    params: Params, prefix: str, heads: int, x_SW: Sequence[Tensor], causal: bool
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """y = ln(z + network(ln z)) with z = x + attention(ln x), and each place's weight on each, the mean over heads."""
    places, width = range(len(x_SW)), len(x_SW[0])
    part = width // heads
    query, key, value = [], [], []
    for x_W in x_SW:
        all_W = linear(params, f"{prefix}.project", layer_norm(params, f"{prefix}.norm_attention", x_W))
        query.append(all_W[:width])
        key.append(all_W[width : 2 * width])
        value.append(all_W[2 * width :])
    out, weights = [], [[x_SW[0].new_zeros(()) for _ in places] for _ in places]
    for i in places:
        joined = []
        for h in range(heads):
            own = slice(h * part, (h + 1) * part)
            seen = [j for j in places if j <= i or not causal]
            power = [torch.exp((query[i][own] * key[j][own]).sum() / math.sqrt(part)) for j in seen]
            attended = torch.zeros_like(x_SW[0][own])
            for j, p in zip(seen, power, strict=True):
                attended = attended + p / sum(power) * value[j][own]
                weights[i][j] = weights[i][j] + p / sum(power) / heads
            joined.append(attended)
        z_W = x_SW[i] + linear(params, f"{prefix}.join", torch.cat(joined))
        hidden = gelu(linear(params, f"{prefix}.network.0", layer_norm(params, f"{prefix}.norm_network", z_W)))
        out.append(layer_norm(params, f"{prefix}.norm_out", z_W + linear(params, f"{prefix}.network.2", hidden)))
    return out, weights


def task_id(params: Params, kind: str, task: int, num_tasks: int, unseen: Sequence[int]) -> Tensor:
    """The task's one-hot or learnt vector, of which a task that was held out has zeros, or nothing."""
    some = params["position_FW"]
    if kind == "none":
        return some.new_zeros(0)
    if task in unseen:
        return some.new_zeros(num_tasks)
    if kind == "embedding":
        return params["id_TI"][task]
    return torch.stack([some.new_ones(()) if t == task else some.new_zeros(()) for t in range(num_tasks)])


def facets(
    params: Params, x_BFD: Tensor, blocks: Sequence[Sequence[Example]], heads: int, causal: bool,
    task_ids: Sequence[Tensor],
) -> tuple[dict[Example, Tensor], dict[Example, dict[Example, Tensor]]]:  # fmt: skip
    """h of every example, and its weight on every example of its block in facet 2."""
    h, weight = {}, {}
    for block in blocks:
        tokens = []
        for row, task in block:
            sequence = []
            for feature, x_D in enumerate(x_BFD[row]):
                position_W = params["position_FW"][feature]
                filling = x_D.new_zeros(len(position_W) - len(x_D) - len(task_ids[task]))
                sequence.append(torch.cat([x_D, task_ids[task], filling]) + position_W)
            h[row, task] = torch.cat(gpt_block(params, "over_features", heads, sequence, causal)[0])
            tokens.append(linear(params, "example", torch.cat([*x_BFD[row], task_ids[task]])))
        crossed, weights = gpt_block(params, "over_examples", heads, tokens, causal)
        for place, example in enumerate(block):
            h[example] = torch.cat([h[example], crossed[place]])
            weight[example] = dict(zip(block, weights[place], strict=True))
    return h, weight


def cut(sequence: Sequence[Example], size: int) -> list[list[Example]]:
    """Blocks of `size`, the last of what is left."""
    return [list(sequence[start : start + size]) for start in range(0, len(sequence), size)]


def task_blocks(order_BT: Sequence[Sequence[float]], size: int, unseen: Sequence[int]) -> list[list[Example]]:
    """Blocks of a row's tasks, taken in ascending order of their numbers; tasks held out are alone."""
    blocks = []
    for row, order_T in enumerate(order_BT):
        ordered = sorted(range(len(order_T)), key=lambda task: order_T[task])
        blocks += cut([(row, task) for task in ordered if task not in unseen], size)
        blocks += [[(row, task)] for task in unseen]
    return blocks


def row_blocks(
    observed_BT: Sequence[Sequence[bool]], order_N: Sequence[float], size: int, unseen: Sequence[int]
) -> list[list[Example]]:
    """Blocks of what is observed, row after row, then taken in ascending order of the numbers."""
    found = [(b, t) for b, row in enumerate(observed_BT) for t, seen in enumerate(row) if seen and t not in unseen]
    return cut([found[n] for n in sorted(range(len(found)), key=lambda n: order_N[n])], size)


def stacked(found: Mapping[Example, Tensor], num_rows: int, num_tasks: int) -> Tensor:
    """(B, T, ...): what was found of each row and task, zeros where nothing was."""
    nothing = torch.zeros_like(next(iter(found.values())))
    return torch.stack(
        [torch.stack([found.get((row, task), nothing) for task in range(num_tasks)]) for row in range(num_rows)]
    )
