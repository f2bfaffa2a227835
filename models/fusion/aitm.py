"""Adaptive information transfer along a chain of tasks (AITM; Xi et al., KDD 2021, arXiv 2105.08489)."""

# Shapes: B rows, T tasks, D width in and out, 2 the vectors attended over: what the task before passes on, and its own.

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from features.errors import UserError
from models.fusion.fusion import Fusion
from models.layers import PLAIN_EXPERTS, ExpertLayers


class Transfer(nn.Module):
    """One step of the chain: the AIT module (Xi et al. 2021, section 3).

    With p = g(z) of the task before: z' = sum of w_u h1(u) over u in {p, q}, w = softmax(<h2(u), h3(u)> / sqrt(D)).

    Args:
        dim: D. dropout: after g.
    Call Args:
        z_BD: of the task before. q_BD: the task's own.
    Returns: z'_BD.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.pass_on = nn.Linear(dim, dim)  # g
        self.project = nn.Linear(dim, 3 * dim, bias=False)  # h1, h2 and h3 in one product
        self.dropout = nn.Dropout(dropout)

    def forward(self, z_BD: Tensor, q_BD: Tensor) -> Tensor:
        weight_B2, value_B2D = self.attend(z_BD, q_BD)
        return (weight_B2.unsqueeze(2) * value_B2D).sum(1)

    def attend(self, z_BD: Tensor, q_BD: Tensor) -> tuple[Tensor, Tensor]:
        """weight_B2 on the task before and on the task itself, and the values h1 of both, value_B2D."""
        p_BD = self.dropout(torch.relu(self.pass_on(z_BD)))
        h1_B2D, h2_B2D, h3_B2D = self.project(torch.stack([p_BD, q_BD], 1)).chunk(3, 2)
        score_B2 = (h2_B2D * h3_B2D).sum(2) / math.sqrt(q_BD.shape[1])
        return score_B2.softmax(1), h1_B2D


class AITM(Fusion):
    """Each task attends to itself and to the task before it in a chain (Xi et al. 2021, section 3).

    g is a layer with ReLU and dropout and the projections have no bias, as in the authors' code. Every step has a g and
    projections of its own; the paper gives g an index and the projections none.

    Args:
        in_dim: D in. num_tasks: T. widths: of each task's own network, the last is D out.
        chain: the tasks from the first step to the last (in a config by name); None: the schema's order.
        calibrator: weight of the behavioural expectation calibrator, see `penalty`. The paper's .6 is for funnels, where
            each step implies the one before.
        dropout: after g, and after each layer of the tasks' networks unless `experts` has a dropout of its own.
        experts: layers of the tasks' networks, by default linear and ReLU.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: a chain that does not name each task once.
    """

    task_arguments = ("chain",)

    def __init__(
        self, in_dim: int, num_tasks: int, widths: Sequence[int], chain: Sequence[int] | None = None,
        calibrator: Annotated[float, Field(ge=0)] = 0.0, dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        experts: ExpertLayers = PLAIN_EXPERTS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.chain = list(range(num_tasks)) if chain is None else list(chain)
        if sorted(self.chain) != list(range(num_tasks)):
            raise UserError(f"model.fusion.chain: must name each of the {num_tasks} tasks exactly once, or be null")
        self.num_tasks, self.out_dim, self.calibrator = num_tasks, widths[-1], calibrator
        layers = experts if experts.dropout else experts.model_copy(update={"dropout": dropout})
        self.networks = layers.stack(num_tasks, in_dim, widths)
        self.transfers = nn.ModuleList(Transfer(self.out_dim, dropout) for _ in self.chain[1:])

    def forward(self, x_BD: Tensor) -> Tensor:
        q_TBD = self.networks(x_BD.unsqueeze(0)).unbind()  # unlike slices, with one gradient for all
        z_BD = q_TBD[self.chain[0]]
        done = {self.chain[0]: z_BD}
        # A loop over tasks, unlike elsewhere: each step reads what the one before it made.
        for task, transfer in zip(self.chain[1:], self.transfers, strict=True):
            done[task] = z_BD = transfer(z_BD, q_TBD[task])
        return torch.stack([done[task] for task in range(self.num_tasks)], 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """One level, weight_BTT: of a task on itself and on the task before it; 0 on the others."""
        z_BTD, q_TBD = self(x_BD), self.networks(x_BD.unsqueeze(0))
        weight_BTT = x_BD.new_zeros(len(x_BD), self.num_tasks, self.num_tasks)
        weight_BTT[:, self.chain[0], self.chain[0]] = 1
        for (before, task), transfer in zip(pairwise(self.chain), self.transfers, strict=True):
            assert isinstance(transfer, Transfer)
            weight_BTT[:, task, [before, task]] = transfer.attend(z_BTD[:, before], q_TBD[task])[0]
        return [weight_BTT]

    def penalty(self, logit_BT: Tensor) -> Tensor | None:
        """The behavioural expectation calibrator: by how much a step is likelier than the one before it.

        Returns: calibrator * sum of max(p_t - p_(t-1), 0) over the chain, loss_B; None where calibrator is 0.
        """
        if self.calibrator == 0:
            return None
        p_BT = logit_BT.float().sigmoid()[:, self.chain]
        return self.calibrator * (p_BT[:, 1:] - p_BT[:, :-1]).relu().sum(1)
