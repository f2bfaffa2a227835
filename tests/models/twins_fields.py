"""Twins of what attends over features: float64, one row, task, group, head and token at a time (see twins.py)."""

# Shapes: B rows, T tasks, F features, W width of a token, G groups, P inducing points, S tokens (the tasks', then the
# features'), D width out.

from collections.abc import Sequence

import torch
from torch import Tensor
from twins import Fused, Params, mix, mlp, softmax

Tokens = list[Tensor]  # of one row, W each


def linear(params: Params, name: str, x_D: Tensor) -> Tensor:
    """A layer of nn.Linear: W x + b."""
    bias = params.get(f"{name}.bias")
    return params[f"{name}.weight"] @ x_D + (0 if bias is None else bias)


def stacked(params: Params, name: str, network: int, x_D: Tensor) -> Tensor:
    """One layer of a stack: x W + b."""
    bias_SH = params.get(f"{name}.bias_SH")
    return x_D @ params[f"{name}.weight_SDH"][network] + (0 if bias_SH is None else bias_SH[network])


def norm(x_W: Tensor, params: Params | None = None, name: str = "") -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5), and the layer norm's own scale and shift where it has them."""
    away_W = x_W - sum(x_W) / len(x_W)
    x_W = away_W / (sum(away_W**2) / len(x_W) + 1e-5) ** 0.5
    return x_W if params is None else x_W * params[f"{name}.weight"] + params[f"{name}.bias"]


def excitation(params: Params, name: str, network: int, x_FW: Tokens) -> list[Tensor]:
    """A gate per field: 2 sigmoid(V relu(U z + a) + b), z the mean of each field."""
    z_F = torch.stack([sum(x_W) / len(x_W) for x_W in x_FW])
    hidden = torch.relu(stacked(params, f"{name}.squeeze", network, z_F))
    return [2 / (1 + (-score).exp()) for score in stacked(params, f"{name}.excite", network, hidden)]


def allows(mask: str, tasks: int, asking: int, asked: int) -> bool:
    """Whether the one token may look at the other; the tasks' come first."""
    if mask in ("FxT", "FxT_TxT") and asking >= tasks and asked < tasks:
        return False
    return not (mask in ("TxT", "FxT_TxT") and asking < tasks and asked < tasks and asking != asked)


def transformer(params: Params, name: str, x_SW: Tokens, heads: int, tasks: int, mask: str) -> tuple[Tokens, Tensor]:
    """z = x + W_o [heads], y = z + V relu(U norm(z)); and what each token gives the others, the mean of the heads."""
    width = len(x_SW[0]) // heads
    y_SW = [norm(x_W, params, f"{name}.norm") for x_W in x_SW]
    q_SW = [linear(params, f"{name}.query", y_W) for y_W in y_SW]
    k_SW, v_SW = zip(*(linear(params, f"{name}.key_value", y_W).chunk(2) for y_W in y_SW), strict=True)
    out_SW, weight_SS = [], torch.zeros(len(x_SW), len(x_SW), dtype=torch.float64)
    for s, x_W in enumerate(x_SW):
        seen = [r for r in range(len(x_SW)) if allows(mask, tasks, s, r)]
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            weights = softmax([q_SW[s][own] @ k_SW[r][own] / width**0.5 for r in seen])
            parts.append(mix(weights, [v_SW[r][own] for r in seen]))
            for r, weight in zip(seen, weights, strict=True):
                weight_SS[s, r] += weight.detach() / heads
        z_W = x_W + linear(params, f"{name}.out", torch.cat(parts))
        hidden = torch.relu(linear(params, f"{name}.up", norm(z_W, params, f"{name}.forward_norm")))
        out_SW.append(z_W + linear(params, f"{name}.down", hidden))
    return out_SW, weight_SS


def multitab(params: Params, x_BFW: Tensor, num_tasks: int, layers: int, heads: int, mask: str) -> Fused:
    """Task tokens before feature tokens, through all blocks; a task takes its own token, normalised."""
    rows, gates = [], []
    for x_FW in x_BFW:
        token_SW = [*params["task_TW"], *x_FW]
        for layer in range(layers):
            token_SW, weight_SS = transformer(params, f"blocks.{layer}", token_SW, heads, num_tasks, mask)
        rows.append(torch.stack([norm(token_W, params, "norm") for token_W in token_SW[:num_tasks]]))
        gates.append(weight_SS[:num_tasks, num_tasks:])
    return torch.stack(rows), [torch.stack(gates)]


def interest(params: Params, task: int, behaviour: int, x_W: Tensor) -> Tensor:
    """x + V relu(U (g * norm(x) + b)), where 1 + the first half of what is generated is g, and the second b."""
    pair = linear(params, "interests.task_layer", params["interests.task_TC"][task])
    pair = pair + linear(params, "interests.behaviour_layer", params["interests.behaviour_KC"][behaviour])
    made = linear(params, "interests.generate", torch.relu(pair))
    y_W = (1 + made[: len(x_W)]) * norm(x_W) + made[len(x_W) :]
    return x_W + linear(params, "interests.down", torch.relu(linear(params, "interests.up", y_W)))


def dtrn(params: Params, x_BFW: Tensor, num_tasks: int, widths: Sequence[int], behaviours: Sequence[int]) -> Fused:
    """Per task: behaviours as it reads them, every field times its gate, side by side into the task's network."""
    rows, gates = [], []
    for x_FW in x_BFW:
        h_TD, gate_TF = [], []
        for t in range(num_tasks):
            own_FW = list(x_FW)
            for k, field in enumerate(behaviours):
                own_FW[field] = interest(params, t, k, x_FW[field])
            gate_F = excitation(params, "excitation", t, own_FW)
            x_D = torch.cat([gate * x_W for gate, x_W in zip(gate_F, own_FW, strict=True)])
            h_TD.append(mlp(params, "networks.", t, len(widths), x_D))
            gate_TF.append(torch.stack(gate_F))
        rows.append(torch.stack(h_TD))
        gates.append(torch.stack(gate_TF))
    return torch.stack(rows), [torch.stack(gates)]


def group(params: Params, name: str, g: int, x_FW: Tokens) -> Tokens:
    """One group's block: all fields into each point, each field out of the points, feed-forward, gates."""
    width = len(x_FW[0])
    y_FW = [norm(x_W) for x_W in x_FW]
    v_FW, q_FW = zip(*(stacked(params, f"{name}.value_query", g, y_W).chunk(2) for y_W in y_FW), strict=True)
    score_FP = [stacked(params, f"{name}.ask", g, y_W) for y_W in y_FW]
    point_PW = [mix(softmax([score_P[p] for score_P in score_FP]), v_FW) for p in range(len(score_FP[0]))]
    pairs = (stacked(params, f"{name}.point_key_value", g, point_W).chunk(2) for point_W in point_PW)
    k_PW, v_PW = zip(*pairs, strict=True)
    out_FW = []
    for x_W, q_W in zip(x_FW, q_FW, strict=True):
        h_W = mix(softmax([q_W @ k_W / width**0.5 for k_W in k_PW]), v_PW)
        z_W = x_W + stacked(params, f"{name}.out", g, h_W)
        hidden = torch.relu(stacked(params, f"{name}.up", g, norm(z_W)))
        out_FW.append(z_W + stacked(params, f"{name}.down", g, hidden))
    gate_F = excitation(params, f"{name}.excitation", g, out_FW)
    return [gate * x_W for gate, x_W in zip(gate_F, out_FW, strict=True)]


def apem(params: Params, x_BFW: Tensor, num_tasks: int, widths: Sequence[int], layers: int, groups: int) -> Fused:
    """Groups make patterns of each field; a task takes a softmax of all, field by field, times F, into its network."""
    rows, gates = [], []
    for x_FW in x_BFW:
        pattern_GFW = [list(x_FW) for _ in range(groups)]
        for layer in range(layers):
            pattern_GFW = [group(params, f"blocks.{layer}", g, own) for g, own in enumerate(pattern_GFW)]
        h_TD, gate_TF = [], []
        for t in range(num_tasks):
            indicator_W = params["indicator_TW"][t]
            all_N = [p_W for own in pattern_GFW for p_W in own]
            weight_N = softmax([norm(p_W) @ indicator_W / len(p_W) ** 0.5 for p_W in all_N])
            fields = range(len(x_FW))
            of_field = [[g * len(x_FW) + f for g in range(groups)] for f in fields]
            read = [len(x_FW) * mix([weight_N[n] for n in own], [all_N[n] for n in own]) for own in of_field]
            h_TD.append(mlp(params, "networks.", t, len(widths), torch.cat(read)))
            gate_TF.append(torch.stack([sum(weight_N[n] for n in own) for own in of_field]))
        rows.append(torch.stack(h_TD))
        gates.append(torch.stack(gate_TF))
    return torch.stack(rows), [torch.stack(gates)]
