"""Twin of EMM: one row, model, task and layer at a time, written from the paper's equations (section III-B).

The structure is read off the names and shapes of the parameters.
"""

# Shapes: B rows, T tasks, M models, D width, 2 a task and the one it picked.

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from twins import Fused, Params, by_row, gate, mix, mlp, softmax


def emm(params: Params, x_BD: Tensor, task_M: Sequence[int], columns_M: Sequence[Sequence[int]]) -> Fused:
    """h_BTD, and for every level how much of each model is in each task.

    Args:
        task_M: of each model. columns_M: those of x that it reads.
    """
    num_tasks = max(task_M) + 1
    num_levels = 1 + max(int(name.split(".")[1]) for name in params)

    def row(x_D: Tensor) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
        input_MD = [torch.stack([x_D[column] for column in columns]) for columns in columns_M]
        seen_TD = [x_D] * num_tasks
        shares = []
        for level in range(num_levels):
            prefix = f"levels.{level}."
            h_MD = [component(params, f"{prefix}components.{m}.", input_D) for m, input_D in enumerate(input_MD)]
            gate_TM, h_TD = [], []
            for t in range(num_tasks):  # eq. 2
                own = [m for m, task in enumerate(task_M) if task == t]
                gate_TM.append(gate(params[f"{prefix}gate.weight_SDH"][t], seen_TD[t], own))
                h_TD.append(mix(gate_TM[t], h_MD))
            z_TD, share_TM = h_TD, gate_TM
            if f"{prefix}merge.gate.weight_SDH" in params:
                z_TD, share_TM = [], []
                for t in range(num_tasks):
                    c_2, z_D, picked = merge(params, f"{prefix}merge.", t, h_TD, seen_TD[t])
                    pairs = zip(gate_TM[t], gate_TM[picked], strict=True)
                    share_TM.append([c_2[0] * mine + c_2[1] * other for mine, other in pairs])
                    z_TD.append(z_D)
            shares.append(share_TM)
            input_MD, seen_TD = [z_TD[task] for task in task_M], z_TD  # Algorithm 2
        return seen_TD, shares

    return by_row(row, x_BD)


def component(params: Params, prefix: str, x_D: Tensor) -> Tensor:
    depth = sum(name.startswith(prefix) and name.endswith("weight_SDH") for name in params)
    return mlp(params, prefix, 0, depth, x_D)


def merge(params: Params, prefix: str, t: int, h_TD: Sequence[Tensor], x_D: Tensor) -> tuple[list[Tensor], Tensor, int]:
    """Eq. 3-6 for task t: the shares of the pair, z_D, and which task was picked."""
    others = [s for s in range(len(h_TD)) if s != t]
    f_T = gate(params[f"{prefix}gate.weight_SDH"][t], x_D, range(len(h_TD)))
    picked = max(others, key=lambda s: f_T[s].item())
    dim = len(h_TD[t])
    weight_D3D, bias_3D = params[f"{prefix}project.weight_SDH"][t], params[f"{prefix}project.bias_SH"][t]
    score_2, value_2D = [], []
    for w_D in (h_TD[t], f_T[picked] * h_TD[picked]):
        query_D, key_D, value_D = (
            torch.relu(w_D @ weight_D3D[:, n * dim : (n + 1) * dim] + bias_3D[n * dim : (n + 1) * dim])
            for n in range(3)
        )
        score_2.append(sum(query_D * key_D) / math.sqrt(dim))
        value_2D.append(value_D)
    c_2 = softmax(score_2)
    return c_2, mix(c_2, value_2D), picked
