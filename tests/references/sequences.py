"""References of what reads sequences: float64, one row, task, sequence and item at a time (see loops.py)."""

# Shapes: B rows, T tasks, F features, J sequences, L items of one, D width of an item, W of a token.

from collections.abc import Mapping, Sequence

import torch
from references.loops import Params, mix, mlp, softmax
from torch import Tensor


def linear(params: Params, name: str, x_D: Tensor) -> Tensor:
    """A layer of nn.Linear: W x + b."""
    bias = params.get(f"{name}.bias")
    return params[f"{name}.weight"] @ x_D + (0 if bias is None else bias)


def norm(x_W: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5)."""
    away_W = x_W - sum(x_W) / len(x_W)
    return away_W / (sum(away_W**2) / len(x_W) + 1e-5) ** 0.5


def excitation(params: Params, task: int, x_FW: Sequence[Tensor]) -> list[Tensor]:
    """A gate per field: 2 sigmoid(V relu(U z + a) + b), z the mean of each field."""
    h = torch.stack([sum(x_W) / len(x_W) for x_W in x_FW])
    names = ("squeeze.weight_SDH", "squeeze.bias_SH", "excite.weight_SDH", "excite.bias_SH")
    U, a, V, b = (params[f"excitation.{name}"][task] for name in names)
    return [2 / (1 + (-score).exp()) for score in torch.relu(h @ U + a) @ V + b]


def fit(params: Params, sequence: int, item_D: Tensor, candidate_D: Tensor) -> Tensor:
    """The activation unit: a hidden layer and a number, of item and candidate, their difference and their product."""
    pair = torch.cat([item_D, candidate_D, item_D - candidate_D, item_D * candidate_D])
    h_H = mlp(params, "interests.hidden.", sequence, 1, pair)
    return h_H @ params["interests.out.weight_SDH"][sequence][:, 0] + params["interests.out.bias_SH"][sequence][0]


def pooled(params: Params, sequence: int, items: Sequence[Tensor], candidate_D: Tensor) -> Tensor:
    """sum_l a(e_l, v) e_l."""
    total_D = torch.zeros_like(candidate_D)
    for item_D in items:
        total_D = total_D + fit(params, sequence, item_D, candidate_D) * item_D
    return total_D


def conditional(params: Params, name: str, task: int, behaviour: int, x_W: Tensor) -> Tensor:
    """g * norm(x) + b, where 1 + the first half of what is generated is g, and the second b."""
    pair = linear(params, "interests.task_layer", params["interests.task_TC"][task])
    pair = pair + linear(params, "interests.behaviour_layer", params["interests.behaviour_KC"][behaviour])
    made = linear(params, name, torch.relu(pair))
    return (1 + made[: len(x_W)]) * norm(x_W) + made[len(x_W) :]


def interest(params: Params, task: int, behaviour: int, x_W: Tensor) -> Tensor:
    """x + V relu(U (g * norm(x) + b))."""
    y_W = conditional(params, "interests.generate", task, behaviour, x_W)
    return x_W + linear(params, "interests.down", torch.relu(linear(params, "interests.up", y_W)))


def attended(params: Params, task: int, behaviour: int, own_W: Tensor, items: Sequence[Tensor]) -> Tensor:
    """x + A z: z the mean of a sequence's conditional norms, weighed by softmax(q y / sqrt(W)), q = Q y of its first place."""
    places = params["interests.attention.place_SW"]
    name = "interests.attention.generate"
    y_SW = [
        conditional(params, name, task, behaviour, x_W + places[s]) for s, x_W in enumerate([own_W, *items])
    ]  # fmt: skip
    ask_W = linear(params, "interests.attention.ask", y_SW[0])
    weight_S = softmax([ask_W @ y_W / len(y_W) ** 0.5 for y_W in y_SW])
    return own_W + linear(params, "interests.attention.answer", mix(weight_S, y_SW))


def dtrn(
    params: Params,
    x_BFW: Tensor,
    items_BJ: Sequence[Sequence[Sequence[Tensor]]],
    num_tasks: int,
    widths: Sequence[int],
    behaviours: Sequence[int],
    sequences: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    """Per task: behaviours as it reads them, sequences with their items, every field times its gate, into its network.

    Args:
        items_BJ: of each row and sequence the tokens that there are. sequences: the fields that they belong to.
    """
    rows, gates = [], []
    for x_FW, items_J in zip(x_BFW, items_BJ, strict=True):
        items: Mapping[int, Sequence[Tensor]] = dict(zip(sequences, items_J, strict=True))
        h_TD, gate_TF = [], []
        for t in range(num_tasks):
            own_FW = list(x_FW)
            for k, field in enumerate(behaviours):
                x_W = attended(params, t, k, x_FW[field], items[field]) if field in items else x_FW[field]
                own_FW[field] = interest(params, t, k, x_W)
            gate_F = excitation(params, t, own_FW)
            x_D = torch.cat([gate * x_W for gate, x_W in zip(gate_F, own_FW, strict=True)])
            h_TD.append(mlp(params, "networks.", t, len(widths), x_D))
            gate_TF.append(torch.stack(gate_F))
        rows.append(torch.stack(h_TD))
        gates.append(torch.stack(gate_TF))
    return torch.stack(rows), [torch.stack(gates)]
