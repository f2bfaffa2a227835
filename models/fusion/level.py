"""One level of units, each of which has experts and a gate: what PLE and AdaTT are made of."""

# Shapes: B rows, E experts of all units, D and H widths in and out, U units, O units that pass something on.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers import StackedLinear, StackedMLP, mix


class UnitLevel(nn.Module):
    """Units with experts of their own; each passes on a gated sum of the experts it may see.

    Args:
        in_dim: D. layers: of each expert, the last is H. counts: experts of each of the U units.
        outputs: O, the first units; the others only have experts.
        visible_OE: bool, the experts that a unit's gate chooses from.
        native: add each unit's own experts, combined by a learnt vector (AdaTT, eq. 7); one expert counts fully.
        first: all units read the same input.
    Call Args:
        x_UBD: inputs of the units; x_1BD at the first level.
    Returns: h_OBH.
    """

    unit_E: Tensor
    hidden_OE: Tensor
    own_OE: Tensor
    learnt_OE: Tensor

    def __init__(
        self, in_dim: int, layers: Sequence[int], counts: Sequence[int], outputs: int, visible_OE: Tensor,
        native: bool = False, first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.outputs, self.first = outputs, first
        unit_E = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.experts = StackedMLP(len(unit_E), in_dim, layers)
        self.gate = StackedLinear(outputs, in_dim, len(unit_E), bias=False)
        own_OE = torch.arange(outputs).unsqueeze(1) == unit_E
        size_O1 = torch.tensor(counts[:outputs]).unsqueeze(1)
        self.register_buffer("unit_E", unit_E, persistent=False)
        self.register_buffer("hidden_OE", ~visible_OE, persistent=False)
        self.register_buffer("own_OE", own_OE, persistent=False)
        self.register_buffer("learnt_OE", own_OE & (size_O1 > 1), persistent=False)
        start_OE = (torch.rand(outputs, len(unit_E)) * 2 - 1) / size_O1.clamp(min=1).sqrt()
        self.native_OE = nn.Parameter(start_OE * self.learnt_OE) if native and self.learnt_OE.any() else None
        self.has_native = native

    def forward(self, x_UBD: Tensor) -> Tensor:
        x_EBD = x_UBD.expand(len(self.unit_E), -1, -1) if self.first else x_UBD[self.unit_E]
        return mix(self.weights(x_UBD), self.experts(x_EBD))

    def weights(self, x_UBD: Tensor) -> Tensor:
        """weight_OBE that mixes the experts: gate, and the native vector where there is one (AdaTT, eq. 10)."""
        x_OBD = x_UBD.expand(self.outputs, -1, -1) if self.first else x_UBD[: self.outputs]
        gate_OBE = self.gate(x_OBD).masked_fill(self.hidden_OE.unsqueeze(1), -torch.inf).softmax(-1)
        if not self.has_native:
            return gate_OBE
        native_OE = self.own_OE.to(gate_OBE.dtype)
        if self.native_OE is not None:
            native_OE = torch.where(self.learnt_OE, self.native_OE, native_OE)
        return gate_OBE + native_OE.unsqueeze(1)


class UnitNetwork(nn.Module):
    """Levels of units: a unit a task, and one of shared experts where there are any, which ends below the last level.

    Args:
        in_dim: D in. num_tasks: T. levels: for each level the layers of its experts; the last is D out.
        task_experts, shared_experts: experts of each task's unit and of the shared unit (0: none).
        isolated: a task's gate sees its own and the shared experts only.
        native: see UnitLevel.
    Shapes: x_BD -> h_BTD.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Sequence[Sequence[int]], task_experts: int, shared_experts: int,
        isolated: bool, native: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_dim = levels[-1][-1]
        counts = [task_experts] * num_tasks + [shared_experts] * (shared_experts > 0)
        unit_E = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        # The shared unit comes last: it sees all experts, and all see its own.
        visible_UE = (torch.arange(len(counts)).unsqueeze(1) == unit_E) | (unit_E == num_tasks)
        visible_UE[num_tasks:] = True
        visible_UE |= not isolated
        dims = [in_dim, *(layers[-1] for layers in levels)]
        self.levels = nn.ModuleList()
        for index, layers in enumerate(levels):
            outputs = num_tasks if index == len(levels) - 1 else len(counts)
            visible_OE = visible_UE[:outputs]
            self.levels.append(UnitLevel(dims[index], layers, counts, outputs, visible_OE, native, first=index == 0))

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
