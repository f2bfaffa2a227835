"""Hierarchy of multi-gate experts (HoME, arXiv 2408.05430)."""

# Shapes: B rows, T tasks, G groups of tasks and the shared one, C categories of experts, N experts of a category, E = C N,
# U units that mix experts, S networks of a stack, L low-rank maps of a category, M of all, D and H widths in and out, K width
# of what a gate reads.

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import UserError
from models.fusion.fusion import Fusion, GateNames, numbered
from models.layers import StackedLinear, mix

Layers = Annotated[Sequence[Annotated[int, Field(ge=2)]], Field(min_length=1)]


def checked_groups(groups: Sequence[int | Sequence[int]], num_tasks: int) -> list[Sequence[int]]:
    """The groups. Raises UserError where they are not lists that name each task once."""
    lists = [group for group in groups if isinstance(group, Sequence)]
    found = sorted(task for group in lists for task in group)
    if len(lists) < len(groups) or not all(lists) or found != list(range(num_tasks)):
        raise UserError(
            f"model.fusion.groups: must be lists that name each of the {num_tasks} tasks exactly once, such as [[a, b], [c]], "
            "or null"
        )
    return lists


class FeatureGates(nn.Module):
    """Scales an input for each category: x * sum_l softmax(x W)_l 2 sigmoid(x B_l A_l), with B_l of D x rank, A_l of rank x D.

    Scales start near 1. They would be exactly 1 if A started at 0, but then the first gradient of W would be rounding errors
    only, which Adam scales up to full steps.

    Args:
        categories: C, each with weights of its own. dim: D. rank: inner width. loras: L; M = C L.
    Shapes: x_CBD, or x_1BD for all -> x_CBD.
    """

    def __init__(self, categories: int, dim: int, rank: int, loras: int) -> None:
        super().__init__()
        self.loras = loras
        self.down = StackedLinear(categories * loras, dim, rank, bias=False)
        self.up = StackedLinear(categories * loras, rank, dim, bias=False)
        self.choice = StackedLinear(categories, dim, loras, bias=False) if loras > 1 else None

    def forward(self, x_CBD: Tensor) -> Tensor:
        scale_MBD = 2 * self.up(self.down(x_CBD)).sigmoid()
        if self.choice is None:
            return x_CBD * scale_MBD
        scale_CLBD = scale_MBD.unflatten(0, (-1, self.loras))
        weight_CLB1 = self.choice(x_CBD).softmax(2).transpose(1, 2).unsqueeze(3)
        return x_CBD * (weight_CLB1 * scale_CLBD).sum(1)


class NormalisedLayer(nn.Module):
    """One layer of each expert: Swish(scale * norm(x W + b) + shift), where norm is over the units of one row and expert.

    Args:
        experts: S. in_dim, out_dim: D and H.
    Shapes: x_SBD, or x_CBD where S / C that follow each other read the same -> y_SBH.
    """

    def __init__(self, experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear = StackedLinear(experts, in_dim, out_dim)
        self.scale_S1H = nn.Parameter(torch.ones(experts, 1, out_dim))
        self.shift_S1H = nn.Parameter(torch.zeros(experts, 1, out_dim))

    def forward(self, x_SBD: Tensor) -> Tensor:
        y_SBH = F.layer_norm(self.linear(x_SBD), self.scale_S1H.shape[2:])
        return F.silu(y_SBH * self.scale_S1H + self.shift_S1H)


class Level(nn.Module):
    """Categories of N experts behind a feature gate each; units that mix the experts of those categories that they see.

    Args:
        in_dim: D. layers: of each expert, the last is H. experts: N.
        gate_dim: K.
        visible_UC: bool, the categories that a unit's gate chooses from. Unit u has category u as its own.
        rank, loras: see FeatureGates.
    Call Args:
        x_CBD: inputs of the categories; x_1BD for all. gate_UBK: inputs of the units' gates; gate_1BK for all.
    Returns: h_UBH.
    """

    own_U1C1: Tensor
    hidden_U1E: Tensor

    def __init__(
        self, in_dim: int, layers: Sequence[int], experts: int, gate_dim: int, visible_UC: Tensor, rank: int, loras: int
    ) -> None:
        super().__init__()
        self.units, categories = visible_UC.shape
        self.feature_gates = FeatureGates(categories, in_dim, rank, loras)
        dims = [in_dim, *layers]
        self.experts = nn.Sequential(
            *(NormalisedLayer(categories * experts, i, o) for i, o in zip(dims, layers, strict=False))
        )
        self.gate = StackedLinear(self.units, gate_dim, categories * experts, bias=False)
        self.self_gate = StackedLinear(self.units, in_dim, experts, bias=False)
        self.single = experts == 1
        hidden_U1E = ~visible_UC.repeat_interleave(experts, 1).unsqueeze(1)
        self.register_buffer("hidden_U1E", hidden_U1E, persistent=False)
        self.register_buffer("own_U1C1", torch.eye(self.units, categories)[:, None, :, None], persistent=False)

    def forward(self, x_CBD: Tensor, gate_UBK: Tensor) -> Tensor:
        return mix(self.weights(x_CBD, gate_UBK), self.experts(self.feature_gates(x_CBD)))

    def weights(self, x_CBD: Tensor, gate_UBK: Tensor) -> Tensor:
        """weight_UBE that mixes the experts: the gate's, and the self gate's on the unit's own experts."""
        weight_UBE = self.gate(gate_UBK).masked_fill(self.hidden_U1E, -torch.inf).softmax(2)
        score_UBN = self.self_gate(x_CBD[: self.units])  # the one x_1BD where all read the same
        own_UB1N = (score_UBN.sigmoid() if self.single else score_UBN.softmax(2)).unsqueeze(2)
        return weight_UBE + (self.own_U1C1 * own_UB1N).flatten(2)


class HoME(Fusion):
    """Experts of groups of tasks, then of tasks, shared ones at both levels; a mask keeps groups and tasks apart.

    Three changes to gated experts, by the names of the abstract:
    - Expert normalisation and Swish: an expert is Swish(norm(MLP(x))), so that outputs of all experts are distributed alike.
    - Hierarchy mask, two levels. At the first, each group of tasks has a category of experts, and there are shared ones, all on
      the input v: z_g is what gate_g(v) mixes of group g's and the shared experts, z_shared what a gate mixes of all. At the
      second, each task and each group has a category, and there are shared ones: a task's and its group's experts read z_g, the
      shared ones z_shared, and h_t is what gate_t([z_g ; z_shared]) mixes of these three. Gates are softmax(x W) over the
      experts that they see.
    - Feature gates scale what experts read: 2 sigmoid(v B A) of low rank, several mixed by a softmax. Self gates add a further
      mixture of a unit's own experts, by softmax(x W), or sigmoid where there is one, so that these always have a gradient.

    Of the paper only the abstract was reachable here; the levels and the forms of the gates are those of most public
    reimplementations. These differ in details, so the following was chosen: what the gate of z_shared sees and experts of
    the second level read; one feature gate a category, of a given rank; at the second level self gates of tasks only; norm and
    Swish after every layer of an expert. Layer norm, of one row and expert, stands in for the paper's batch norm: statistics
    of a rank's rows would make weights depend on the number of ranks.

    Args:
        in_dim: D in. num_tasks: T.
        levels: for each of the two levels the layers of its experts, such as [[256], [128]]; the last is D out. The norm
            leaves nothing of a layer of one unit.
        groups: the tasks of each group (in a config by name), such as [[click, dwell], [conversion]]; None: all in one.
        experts: N, of each category at both levels. rank: of a feature gate. loras: L, mixed in one feature gate.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: other than two levels, or groups that do not name each task once.
    """

    task_arguments = ("groups",)
    group_T: Tensor
    input_C: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, levels: Sequence[Layers],
        groups: Sequence[int | Sequence[int]] | None = None, experts: Annotated[int, Field(ge=1, le=1000)] = 2,
        rank: Annotated[int, Field(ge=1)] = 16, loras: Annotated[int, Field(ge=1)] = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(levels) != 2:
            raise UserError(f"model.fusion.levels: home has two levels, of groups and of tasks, not {len(levels)}")
        lists = checked_groups([range(num_tasks)] if groups is None else groups, num_tasks)
        count, self.num_tasks, self.out_dim = len(lists), num_tasks, levels[1][-1]
        self.groups, self.num_experts = lists, experts
        group_T = torch.tensor([g for task in range(num_tasks) for g, group in enumerate(lists) if task in group])
        # Categories of the first level: the groups', then the shared; of the second: the tasks' before these.
        sees_group_GC = torch.eye(count + 1, dtype=torch.bool)
        sees_group_GC[:, -1] = sees_group_GC[-1] = True
        sees_task_TC = torch.cat([torch.eye(num_tasks, dtype=torch.bool), sees_group_GC[group_T]], 1)
        self.register_buffer("group_T", group_T, persistent=False)
        self.register_buffer("input_C", torch.cat([group_T, torch.arange(count + 1)]), persistent=False)
        dim = levels[0][-1]
        self.of_groups = Level(in_dim, levels[0], experts, in_dim, sees_group_GC, rank, loras)
        self.of_tasks = Level(dim, levels[1], experts, 2 * dim, sees_task_TC, rank, loras)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.of_tasks(*self._of_groups(x_BD)).transpose(0, 1)

    def _of_groups(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts and what the gates of the second level read: z_CBD and gate_TBK."""
        x_1BD = x_BD.unsqueeze(0)
        z_GBD = self.of_groups(x_1BD, x_1BD)
        z_CBD = z_GBD.index_select(0, self.input_C)
        return z_CBD, torch.cat([z_CBD[: self.num_tasks], z_GBD[-1:].expand(self.num_tasks, -1, -1)], 2)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Weights of the experts at both levels, self gates included: weight_BUE.

        At the first a row for each task, that of its group, and the shared unit's last; experts by group, the shared ones last.
        At the second a row for each task; experts by task, then by group, the shared ones last.
        """
        x_1BD = x_BD.unsqueeze(0)
        of_group_GBE, of_task_TBE = self.of_groups.weights(x_1BD, x_1BD), self.of_tasks.weights(*self._of_groups(x_BD))
        of_group_UBE = torch.cat([of_group_GBE.index_select(0, self.group_T), of_group_GBE[-1:]])
        return [of_group_UBE.transpose(0, 1), of_task_TBE.transpose(0, 1)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """A group is named by its tasks; the shared experts come last."""
        groups = ["group " + "+".join(tasks[task] for task in group) for group in self.groups] + ["shared"]
        of_groups, of_tasks = (
            numbered(owners, [self.num_experts] * len(owners)) for owners in (groups, [*tasks, *groups])
        )
        return [GateNames([*tasks, "shared"], of_groups), GateNames(list(tasks), of_tasks)]
