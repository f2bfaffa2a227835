"""Shared and task-specific embeddings (STEM-Net; Su et al., AAAI 2024, arXiv 2308.13537)."""

# Shapes: B rows, T tasks, S = T + 1 sets of embeddings (the tasks', then the shared one), E experts, D and H widths in and out.

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from models.fusion.fusion import Fusion, GateNames, numbered
from models.fusion.level import unit_of_each_expert
from models.layers import StackedLinear, StackedMLP, Width, Widths, mix

Count = Annotated[int, Field(ge=1, le=1000)]


class STEM(Fusion):
    """Every id has an embedding for each task and a shared one; a task reads all of them and trains its own and the shared.

    All forward, task-specific backward: experts of task t read the task's set x_t, shared experts the shared set x_s, and
    h_t = sum_e g_te E_e with g_t = softmax(MLP_t(x_t + x_s)) over the experts of all tasks and the shared ones, but a gradient
    passes only to the task's own and the shared experts: the others are constants to it. So the loss of a task has gradient
    exactly 0 in the experts and embeddings of other tasks, whose knowledge it still reads.

    From the authors' code (github.com/LiangcaiSu/STEM, models/STEM.py); the paper's text, and with it the numbers of its
    equations, was not reachable here. Their settings: one level, one expert a task and 8 shared ones, gates with hidden layers
    of 128 and 64. That code allows more levels; there the shared unit, which mixes all experts, would pass the gradient of a
    task on to the embeddings of others, so here is one level.

    Chosen here: the sets of an id are parts of one row of one table, S times as wide as the schema says, so that
    placements, checkpoints and plans need not know of them. A row-wise optimiser (train.tables.name=rowwise_adagrad) thus has
    one accumulator for all sets of a row; adagrad has one for each column. Numbers and their codes are the same in every set,
    so codes learn from all tasks.

    Args:
        in_dim: D of one set. num_tasks: T. widths: of each expert, the last is H.
        task_experts: of each task. shared_experts: on the shared set.
        gate_widths: hidden layers of a gate; [] for a linear one.
    Shapes: x_BSD -> h_BTH.
    """

    own_T1E: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, widths: Widths, task_experts: Count = 1,
        shared_experts: Count = 1, gate_widths: Sequence[Width] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_dim = widths[-1]
        self.counts = counts = [task_experts] * num_tasks + [shared_experts]
        self.experts = StackedMLP(sum(counts), in_dim, widths, readers=counts)
        self.gate_hidden = StackedMLP(num_tasks, in_dim, gate_widths)
        self.gate = StackedLinear(num_tasks, [in_dim, *gate_widths][-1], sum(counts))
        unit_E = unit_of_each_expert(counts)
        own_TE = (torch.arange(num_tasks, device="cpu").unsqueeze(1) == unit_E) | (unit_E == num_tasks)
        self.register_buffer("own_T1E", own_TE.unsqueeze(1), persistent=False)

    @classmethod
    def table_sets(cls, num_tasks: int) -> int:
        return num_tasks + 1

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_SBD = x_BSD.transpose(0, 1)
        expert_EBH, gate_TBE = self.experts(x_SBD), self._gate(x_SBD)
        # Two mixtures of the same experts, since one tensor cannot be a constant to some of its readers only.
        own_TBH = mix(gate_TBE * self.own_T1E, expert_EBH)
        other_TBH = mix(gate_TBE * ~self.own_T1E, expert_EBH.detach())
        return (own_TBH + other_TBH).transpose(0, 1)

    def _gate(self, x_SBD: Tensor) -> Tensor:
        return self.gate(self.gate_hidden(x_SBD[:-1] + x_SBD[-1:])).softmax(2)

    def gates(self, x_BSD: Tensor) -> list[Tensor]:
        """One level: each task's weights of the experts, by task, the shared ones last: weight_BTE."""
        return [self._gate(x_BSD.transpose(0, 1)).transpose(0, 1)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """A task mixes the experts of all tasks and the shared ones."""
        return [GateNames(list(tasks), numbered([*tasks, "shared"], self.counts))]
