"""Adaptive information transfer along a chain of tasks (AITM; Xi et al., KDD 2021, arXiv 2105.08489)."""

# Shapes: B rows, T tasks, C tasks of the chain, D width in and out, 2 the vectors attended over: what the task before passes
# on, and its own.

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import UserError
from models.fusion.fusion import Fusion, GateNames
from models.fusion.tasks import TaskInfo
from models.layers import PLAIN_EXPERTS, ExpertLayers, Widths


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
    projections of its own; the paper gives g an index and the projections none. A task outside of the chain has its own
    network on the shared input, as the chain's first one, and exchanges nothing.

    Args:
        in_dim: D in. num_tasks: T. widths: of each task's own network, the last is D out.
        chain: some of the tasks, from the first step to the last (in a config by name); None: all, in the schema's order.
        calibrator: weight of the behavioural expectation calibrator, see `penalty`. The paper's .6 is for funnels, where
            each step implies the one before.
        dropout: after g, and after each layer of the tasks' networks unless `experts` has a dropout of its own.
        experts: layers of the tasks' networks, by default linear and ReLU.
        tasks: from the schema (not in a config); None: all are binary, of all rows.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: a chain that names no task, or one twice; with a calibrator, a task in it whose probability over all rows is
            not known: a regression, or one that is observed under another without `given` in the schema.
    """

    task_arguments = ("chain",)
    reads_tasks = True
    condition_CT: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, widths: Widths, chain: Sequence[int] | None = None,
        calibrator: Annotated[float, Field(ge=0)] = 0.0, dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        experts: ExpertLayers = PLAIN_EXPERTS,
        tasks: Sequence[TaskInfo] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        tasks = tasks or [TaskInfo(str(task)) for task in range(num_tasks)]
        self.chain = list(range(num_tasks)) if chain is None else list(chain)
        if not self.chain or len(set(self.chain)) < len(self.chain):
            named = ", ".join(tasks[task].name for task in self.chain)
            raise UserError(
                f"model.fusion.chain: [{named}] must name each of its tasks once, and at least one; or be null"
            )
        self.num_tasks, self.out_dim, self.calibrator = num_tasks, widths[-1], calibrator
        if calibrator:
            self.register_buffer("condition_CT", conditions(tasks, self.chain), persistent=False)
        layers = experts if experts.dropout else experts.model_copy(update={"dropout": dropout})
        self.networks = layers.stack(num_tasks, in_dim, widths)
        self.transfers = nn.ModuleList(Transfer(self.out_dim, dropout) for _ in self.chain[1:])

    def forward(self, x_BD: Tensor) -> Tensor:
        q_TBD = self.networks(x_BD.unsqueeze(0)).unbind()  # unlike slices, with one gradient for all
        z_TBD = [q_TBD[task] for task in range(self.num_tasks)]  # an iterator could not be traced
        # A loop over tasks, unlike elsewhere: each step reads what the one before it made.
        for (before, task), transfer in zip(pairwise(self.chain), self.transfers, strict=True):
            z_TBD[task] = transfer(z_TBD[before], z_TBD[task])
        return torch.stack(z_TBD, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """One level, weight_BTT: of a task on itself and on the task before it; 0 on the others."""
        z_BTD, q_TBD = self(x_BD), self.networks(x_BD.unsqueeze(0))
        weight_BTT = torch.eye(self.num_tasks, dtype=x_BD.dtype, device=x_BD.device).repeat(len(x_BD), 1, 1)
        for (before, task), transfer in zip(pairwise(self.chain), self.transfers, strict=True):
            assert isinstance(transfer, Transfer)
            weight_BTT[:, task, [before, task]] = transfer.attend(z_BTD[:, before], q_TBD[task])[0]
        return [weight_BTT]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Tasks mix what tasks have."""
        return [GateNames(list(tasks), list(tasks))]

    def penalty(self, logit_BT: Tensor) -> Tensor | None:
        """The behavioural expectation calibrator: by how much a step is likelier than the one before it.

        The paper's steps are labels of all rows. Of a task that the schema has `given` another, the probability over all rows
        is the product down to the first: p(click), p(click) p(conversion | click).

        Returns: calibrator * sum of max(p_t - p_(t-1), 0) over the chain, loss_B; None where calibrator is 0.
        """
        if self.calibrator == 0:
            return None
        log_p_B1T = F.logsigmoid(logit_BT).unsqueeze(1)
        p_BC = torch.where(self.condition_CT, log_p_B1T, 0).sum(2).exp()
        return self.calibrator * (p_BC[:, 1:] - p_BC[:, :-1]).relu().sum(1)


def conditions(tasks: Sequence[TaskInfo], chain: Sequence[int]) -> Tensor:
    """condition_CT: for each task of a chain, the tasks whose product is its probability over all rows: it and its `given`s.

    Raises:
        UserError: a task of the chain that has no such probability, or of which it cannot be known.
    """
    index = {task.name: t for t, task in enumerate(tasks)}
    condition_C: list[set[str]] = [set() for _ in chain]
    leave_out = "or leave it out of model.fusion.chain, or set model.fusion.calibrator=0"
    for first, names in zip(chain, condition_C, strict=True):
        task = tasks[first]
        while task.name not in names:
            if wrong := _without_probability(task, index):
                raise UserError(f"model.fusion.calibrator: task {tasks[first].name} {wrong}; {leave_out}")
            names.add(task.name)
            task = tasks[index[task.given or task.name]]
    return torch.tensor([[name in names for name in index] for names in condition_C])


def _without_probability(task: TaskInfo, index: Mapping[str, int]) -> str | None:
    """Why the logit of a task does not give a probability over all rows, and what to do."""
    if task.kind != "binary":
        return f"is of kind {task.kind} and has no probability: choose a binary task"
    if task.given is not None and task.given not in index:
        return f"is given {task.given}, which is not among the tasks {', '.join(index)}: train {task.given} too"
    if task.undeclared:
        other = task.undeclared[0]
        return f"is observed by the label of {other}: add `given: {other}` to {task.name} in the schema"
    return None
