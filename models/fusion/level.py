"""One level of units, each of which has experts and a gate: what PLE and AdaTT are made of."""

# Shapes: B rows, T tasks, L levels, E experts of all units, D and H widths in and out, U units, O units that pass
# something on.

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from features.errors import UserError
from models.fusion.fusion import Fusion, GateNames, numbered
from models.layers import LINEAR_GATES, PLAIN_EXPERTS, ExpertLayers, GateLayers, Levels, mix

MAX_EXPERTS = 10_000  # of a level
TaskExperts = int | Sequence[int] | Sequence[Sequence[int]]
SharedExperts = int | Sequence[int]
Native = bool | Literal["published"]


def unit_counts(tasks: TaskExperts, shared: SharedExperts, num_tasks: int, num_levels: int) -> list[list[int]]:
    """Experts of each unit by level: the tasks' units, then the shared one up to the last level with shared experts.

    Args:
        tasks: one number for all; or one a task; or for each level a list of one a task.
        shared: one number for all levels, or one a level.
    Raises:
        UserError: too many or too few numbers, or one below 0.
    """
    per_task: list[Any] = [tasks] * num_tasks if isinstance(tasks, int) else list(tasks)
    count_LT = [per_task] * num_levels if all(isinstance(n, int) for n in per_task) else per_task
    shared_L = [shared] * num_levels if isinstance(shared, int) else shared
    if len(count_LT) != num_levels or any(len(n) != num_tasks or min(n) < 0 for n in count_LT):
        raise UserError(
            f"model.fusion.task_experts: {tasks} is none of a number, {num_tasks} numbers (one a task), "
            f"and {num_levels} lists of {num_tasks} numbers (one list a level), all 0 or more"
        )
    if len(shared_L) != num_levels or min(shared_L) < 0:
        raise UserError(
            f"model.fusion.shared_experts: {shared} is neither a number nor {num_levels} numbers (one a level), "
            "all 0 or more"
        )
    if max(sum(n) for n in count_LT) + max(shared_L) > MAX_EXPERTS:
        raise UserError(f"model.fusion: more than {MAX_EXPERTS:,} experts at a level")
    # Without shared experts at this level or above, the output of a shared unit would be unused.
    return [[*n, shared_L[level]] if any(shared_L[level:]) else list(n) for level, n in enumerate(count_LT)]


def unit_of_each_expert(counts: Sequence[int]) -> Tensor:
    """unit_E of experts in order, in main memory also where a model is built without any: their layout depends on it."""
    return torch.arange(len(counts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))


class UnitLevel(nn.Module):
    """Units with experts of their own; each passes on a gated sum of the experts it may see.

    Args:
        in_dim: D. layers: of each expert, the last is H. counts: experts of each of the U units.
        outputs: O, the first units; the others only have experts.
        visible_OE: bool, the experts that a unit's gate chooses from.
        native: add each unit's own experts, combined by a vector (AdaTT, eq. 7). True: learnt where the unit has several
            experts, 1 where it has one. "published": learnt for every unit unless all U of them have one.
        first: all units read the same input.
        expert_layers, gate_layers: of the experts, and of the gates.
    Call Args:
        x_UBD: inputs of the units; x_1BD at the first level.
    Returns: h_OBH.
    """

    hidden_OE: Tensor
    own_OE: Tensor
    learnt_OE: Tensor

    def __init__(
        self, in_dim: int, layers: Sequence[int], counts: Sequence[int], outputs: int, visible_OE: Tensor,
        native: Native = False, first: bool = False, expert_layers: ExpertLayers = PLAIN_EXPERTS,
        gate_layers: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        super().__init__()
        self.outputs = outputs
        unit_E = unit_of_each_expert(counts)
        self.experts = expert_layers.stack(len(unit_E), in_dim, layers, None if first else counts)
        self.gate = gate_layers.stack(outputs, in_dim, len(unit_E))
        own_OE = torch.arange(outputs, device="cpu").unsqueeze(1) == unit_E
        size_O1 = torch.tensor(counts[:outputs], device="cpu").unsqueeze(1)
        self.register_buffer("hidden_OE", ~visible_OE, persistent=False)
        self.register_buffer("own_OE", own_OE, persistent=False)
        every_unit = native == "published" and any(count != 1 for count in counts)
        self.register_buffer("learnt_OE", own_OE & (every_unit | (size_O1 > 1)), persistent=False)
        start_OE = torch.rand(outputs, len(unit_E)) * 2 - 1
        start_OE = start_OE / size_O1.to(start_OE.device).clamp(min=1).sqrt() * self.learnt_OE.to(start_OE.device)
        self.native_OE = nn.Parameter(start_OE) if native and self.learnt_OE.any() else None
        self.has_native = bool(native)

    def forward(self, x_UBD: Tensor) -> Tensor:
        return mix(self.weights(x_UBD), self.experts(x_UBD))

    def weights(self, x_UBD: Tensor) -> Tensor:
        """weight_OBE that mixes the experts: gate, and the native vector where there is one (AdaTT, eq. 10)."""
        x_OBD = x_UBD[: self.outputs]  # the one x_1BD at the first level
        gate_OBE = self.gate(x_OBD).masked_fill(self.hidden_OE.unsqueeze(1), -torch.inf).softmax(-1)
        if not self.has_native:
            return gate_OBE
        native_OE = self.own_OE.to(gate_OBE.dtype)
        if self.native_OE is not None:
            native_OE = torch.where(self.learnt_OE, self.native_OE, native_OE)
        return gate_OBE + native_OE.unsqueeze(1)


class UnitNetwork(Fusion):
    """Levels of units: a unit a task, and a shared one that passes on as long as there are shared experts above.

    A unit without experts on a level only mixes those of others.

    Args:
        in_dim: D in. num_tasks: T. levels: for each level the layers of its experts; the last is D out.
        task_experts, shared_experts: see `unit_counts`.
        isolated: a task's gate sees its own and the shared experts only.
        native: see UnitLevel. experts, gate: layers of the experts, and of the gates.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: numbers of experts that do not fit, or a task that sees no expert at some level.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Levels, task_experts: TaskExperts,
        shared_experts: SharedExperts, isolated: bool, native: Native, experts: ExpertLayers = PLAIN_EXPERTS,
        gate: GateLayers = LINEAR_GATES,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_dim = levels[-1][-1]
        self.counts_LU = counts_LU = unit_counts(task_experts, shared_experts, num_tasks, len(levels))
        outputs_L = [*(len(counts) for counts in counts_LU[1:]), num_tasks]
        dims = [in_dim, *(layers[-1] for layers in levels)]
        self.levels = nn.ModuleList()
        for index, (layers, counts, outputs) in enumerate(zip(levels, counts_LU, outputs_L, strict=True)):
            unit_E = unit_of_each_expert(counts)
            # The shared unit comes last: it sees all experts, and all see its own.
            visible_OE = (torch.arange(outputs, device="cpu").unsqueeze(1) == unit_E) | (unit_E == num_tasks)
            visible_OE[num_tasks:] = True
            visible_OE |= not isolated
            if not visible_OE.any(1).all():
                raise UserError(f"model.fusion.task_experts: a task sees no expert at level {index + 1}, add one")
            self.levels.append(
                UnitLevel(dims[index], layers, counts, outputs, visible_OE, native, index == 0, experts, gate)
            )

    def forward(self, x_BD: Tensor) -> Tensor:
        h_UBD = x_BD.unsqueeze(0)
        for level in self.levels:
            h_UBD = level(h_UBD)
        return h_UBD.transpose(0, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Weights of the experts per level: weight_BOE, the shared unit's row last where it passes something on."""
        h_UBD, weights = x_BD.unsqueeze(0), []
        for level in self.levels:
            assert isinstance(level, UnitLevel)
            weights.append(level.weights(h_UBD).transpose(0, 1))
            h_UBD = level(h_UBD)
        return weights

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Units are the tasks, then the shared one; experts are named by the unit that has them."""
        owners = [*tasks, "shared"]
        outputs_L = [*(len(counts) for counts in self.counts_LU[1:]), len(tasks)]
        return [
            GateNames(owners[:outputs], numbered(owners[: len(counts)], counts))
            for outputs, counts in zip(outputs_L, self.counts_LU, strict=True)
        ]
