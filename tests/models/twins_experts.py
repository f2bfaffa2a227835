"""Twins of the flat fusions that have no units: one row, task, expert and layer at a time, written from the equations."""

# Shapes: B rows, T tasks, E experts, D width.

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from twins import Fused, Levels, Params, by_row, mix, mlp, softmax


def single_task(params: Params, x_BD: Tensor, num_tasks: int, widths: Sequence[int]) -> Tensor:
    """A network a task, and nothing between them."""
    rows = [[mlp(params, "networks.", t, len(widths), x_D) for t in range(num_tasks)] for x_D in x_BD]
    return torch.stack([torch.stack(h_TD) for h_TD in rows])


def cross_stitch(params: Params, x_BD: Tensor, num_tasks: int, levels: Levels) -> Fused:
    """Misra et al. 2016, eq. 1: after each level x~_s = sum_t a_st x_t, one activation at a time."""

    def row(x_D: Tensor) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
        h_TD, gates = [x_D] * num_tasks, []
        for level, widths in enumerate(levels):
            h_TD = [mlp(params, f"networks.{level}.", t, len(widths), h_TD[t]) for t in range(num_tasks)]
            a_TT = [[params["stitch_LST"][level, s, t] for t in range(num_tasks)] for s in range(num_tasks)]
            h_TD = [
                torch.stack([sum(a_TT[s][t] * h_TD[t][i] for t in range(num_tasks)) for i in range(widths[-1])])
                for s in range(num_tasks)
            ]
            gates.append(a_TT)
        return h_TD, gates

    return by_row(row, x_BD)


def mmoe_of_one_level(params: Params, x_BD: Tensor, num_tasks: int, num_experts: int, widths: Sequence[int]) -> Tensor:
    """Ma et al. 2018, eq. 6-8: f_k = g_k(x) F with g_k = softmax(W_k x) and the experts' outputs as the rows of F."""
    rows = []
    for x_D in x_BD:
        F_ED = torch.stack([mlp(params, "experts.0.", e, len(widths), x_D) for e in range(num_experts)])
        gate_TE = [torch.stack(softmax(list(x_D @ params["gate.0.weight_SDH"][k]))) for k in range(num_tasks)]
        rows.append(torch.stack([gate_E @ F_ED for gate_E in gate_TE]))
    return torch.stack(rows)


def aitm(params: Params, x_BD: Tensor, chain: Sequence[int], widths: Sequence[int]) -> Fused:
    """Xi et al. 2021: z_1 = q_1; p = relu(G z_(t-1) + c); z_t = sum_u w_u h1(u), w = softmax(<h2(u), h3(u)> / sqrt(k)).

    The gates are what a task, by row, takes of each task: of itself and of the one before it.
    """
    zero, width = x_BD.new_zeros(()), widths[-1]

    def row(x_D: Tensor) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
        z_TD, weight_TT = {}, {}
        for step, task in enumerate(chain):
            q_D = mlp(params, "networks.", task, len(widths), x_D)
            weight_TT[task] = [zero] * len(chain)
            if step == 0:
                z_TD[task], weight_TT[task][task] = q_D, zero + 1
                continue
            before, prefix = chain[step - 1], f"transfers.{step - 1}."
            G_DD, c_D = params[prefix + "pass_on.weight"], params[prefix + "pass_on.bias"]
            p_D = torch.relu(G_DD @ z_TD[before] + c_D)
            H1_DD, H2_DD, H3_DD = (params[prefix + "project.weight"][i * width : (i + 1) * width] for i in range(3))
            scores = [torch.dot(H2_DD @ u_D, H3_DD @ u_D) / math.sqrt(width) for u_D in (p_D, q_D)]
            w_p, w_q = softmax(scores)
            z_TD[task] = mix([w_p, w_q], [H1_DD @ p_D, H1_DD @ q_D])
            weight_TT[task][before], weight_TT[task][task] = w_p, w_q
        tasks = range(len(chain))
        return [z_TD[task] for task in tasks], [[weight_TT[task] for task in tasks]]

    return by_row(row, x_BD)


def calibrator(logit_BT: Tensor, chain: Sequence[int], weight: float) -> list[float]:
    """Xi et al. 2021: weight * sum_t max(p_t - p_(t-1), 0) along the chain, by row."""
    losses = []
    for logit_T in logit_BT.tolist():
        p_T = [1 / (1 + math.exp(-logit)) for logit in logit_T]
        losses.append(weight * sum(max(p_T[task] - p_T[chain[i]], 0) for i, task in enumerate(chain[1:])))
    return losses
