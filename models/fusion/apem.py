"""Adaptive pattern extraction (APEM, arXiv 2301.02494)."""

# Shapes: B rows, T tasks, F features, W width of a token, G groups, P inducing points, N = B F, D width out.

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from models.excitation import Excitation
from models.fusion.fusion import Fusion, GateNames
from models.layers import PLAIN_EXPERTS, ExpertLayers, StackedLinear, Widths


class GroupBlock(nn.Module):
    """G parallel pre-norm transformer blocks: fields interact through a few inducing points, then each gets a gate.

    A point is a weighted mean of all fields, and each field attends to the points (Lee et al., Set Transformer, ICML 2019,
    eq. 9-10, one head, without the feed-forward layer at the points), so that the cost is linear in F. Since a
    point's query is the same for every row, it and the layer for keys are one matrix W x P.

    Args:
        groups: G. num_fields: F. dim: W. points: P. hidden: width of the feed-forward layer. squeeze: see Excitation.
    Shapes: x_GBFW -> x_GBFW.
    """

    def __init__(self, groups: int, num_fields: int, dim: int, points: int, hidden: int, squeeze: int) -> None:
        super().__init__()
        self.norm, self.forward_norm = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.ask = StackedLinear(groups, dim, points, bias=False)
        self.value_query = StackedLinear(groups, dim, 2 * dim)
        self.point_key_value = StackedLinear(groups, dim, 2 * dim)
        self.out = StackedLinear(groups, dim, dim)
        self.up, self.down = StackedLinear(groups, dim, hidden), StackedLinear(groups, hidden, dim)
        self.excitation = Excitation(groups, num_fields, squeeze)

    def forward(self, x_GBFW: Tensor) -> Tensor:
        batch, fields = x_GBFW.shape[1:3]
        y_GNW = self.norm(x_GBFW).flatten(1, 2)
        weight_GBFP = self.ask(y_GNW).unflatten(1, (batch, fields)).softmax(2)
        v_GBFW, q_GBFW = self.value_query(y_GNW).unflatten(1, (batch, fields)).chunk(2, 3)
        point_GBPW = weight_GBFP.transpose(2, 3) @ v_GBFW
        k_GBPW, v_GBPW = self.point_key_value(point_GBPW.flatten(1, 2)).unflatten(1, (batch, -1)).chunk(2, 3)
        score_GBFP = q_GBFW @ k_GBPW.transpose(2, 3) / q_GBFW.shape[3] ** 0.5
        h_GBFW = score_GBFP.softmax(3) @ v_GBPW
        x_GBFW = x_GBFW + self.out(h_GBFW.flatten(1, 2)).view_as(x_GBFW)
        y_GNW = self.forward_norm(x_GBFW).flatten(1, 2)
        x_GBFW = x_GBFW + self.down(torch.relu(self.up(y_GNW))).view_as(x_GBFW)
        return x_GBFW * self.excitation(x_GBFW).unsqueeze(3)


class APEM(Fusion):
    """Groups of transformers find patterns in the features of a row; each task selects those it reads, then its network.

    The paper's full text was not reachable here. From its abstract: features are enhanced by a group transformer with a
    modified set attention, which is cheap, and a squeeze-and-excitation over the feature fields; a pattern selector with a
    task-indicator vector a task, adaptive, then selects explicitly what each task reads.

    Chosen here, without the paper's equations: a group is a transformer of its own over all fields (`GroupBlock`), and a
    pattern is what one group makes of one field, G F in all. The weight of a pattern for a task is the softmax over all
    patterns of <u_t, norm(pattern)> / sqrt(W), where u_t is the task's indicator: adaptive, as the pattern is the row's.
    A task then reads a field as the weighted sum of the groups' patterns of it, times F (equal weights give their
    mean), so that fields stay apart for its network.

    Args:
        in_dim: W. num_tasks: T. num_fields: F. widths: of each task's network, the last is D.
        layers: group blocks in a row. groups: G. points: P.
        hidden, squeeze: inside the feed-forward layers and the networks of the gates.
        experts: layers of the tasks' networks, by default linear and ReLU.
    Shapes: x_BFW -> h_BTD.
    """

    fields = True

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, widths: Widths,
        layers: Annotated[int, Field(ge=1)] = 1, groups: Annotated[int, Field(ge=1)] = 2,
        points: Annotated[int, Field(ge=1)] = 4, hidden: Annotated[int, Field(ge=1)] = 16,
        squeeze: Annotated[int, Field(ge=1)] = 16, experts: ExpertLayers = PLAIN_EXPERTS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.groups, self.num_fields, self.out_dim = groups, num_fields, widths[-1]
        self.blocks = nn.Sequential(
            *(GroupBlock(groups, num_fields, in_dim, points, hidden, squeeze) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(in_dim, elementwise_affine=False)
        bound = in_dim**-0.5
        self.indicator_TW = nn.Parameter(torch.empty(num_tasks, in_dim).uniform_(-bound, bound))
        self.networks = experts.stack(num_tasks, num_fields * in_dim, widths)

    def forward(self, x_BFW: Tensor) -> Tensor:
        x_GBFW = self.blocks(x_BFW.expand(self.groups, -1, -1, -1))
        weight_TGBF1 = self._select(x_GBFW).unsqueeze(4)
        x_TBFW = self.num_fields * (weight_TGBF1 * x_GBFW).sum(1)
        return self.networks(x_TBFW.flatten(2)).transpose(0, 1)

    def _select(self, x_GBFW: Tensor) -> Tensor:
        """How much each task takes of each pattern: weight_TGBF, together 1 over G and F."""
        score_GBFT = self.norm(x_GBFW) @ self.indicator_TW.t() / x_GBFW.shape[3] ** 0.5
        score_TBGF = score_GBFT.permute(3, 1, 0, 2)
        return score_TBGF.flatten(2).softmax(2).view_as(score_TBGF).transpose(1, 2)

    def gates(self, x_BFW: Tensor) -> list[Tensor]:
        """One level: each task's weight of each feature, the sum over the groups' patterns of it: weight_BTF."""
        weight_TGBF = self._select(self.blocks(x_BFW.expand(self.groups, -1, -1, -1)))
        return [weight_TGBF.sum(1).transpose(0, 1)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:
        """Tasks weigh features."""
        return [GateNames(list(tasks), list(features))]
