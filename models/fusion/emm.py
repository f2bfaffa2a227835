"""Efficient multi-task modelling: trained single-task models, cut into components and fused level by level (EMM)."""

# Shapes: B rows, T tasks, M trained models, D width, 2 a task and the task it is merged with, S = 1.

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from features.errors import UserError
from models.fusion.decomposition import TrainedModel, decompose
from models.fusion.fusion import Fusion, GateNames
from models.layers import StackedLinear, StackedMLP, mix


class Merge(nn.Module):
    """Multi-task merge: each task attends over itself and the one other task that its fusion gate picks (eq. 3-6).

    f = softmax of W x over all tasks; of the others, the one of largest f is picked, row by row. With w in {h_t, h_picked}:
    z_t = sum of c(w) V(w), c = softmax(<Q(w), K(w)> / sqrt(D)). Q, K and V are one layer each, of every task.

    Picking has no gradient, so the gate of the authors' code never learns. Here h_picked counts f / f0 times, f0 the value
    of f taken as a constant: 1 whatever the number of tasks, with the gradient of log f, by which the gate learns whether
    more of what it picked would lower the loss. How much is exchanged is for c alone. V starts as the identity, so that
    what the trained components above read is at first a mean of their usual inputs.

    Args:
        num_tasks: T. seen_dim: width of x, which the gates read. dim: D.
        projection: Q, K and V: "relu" with a bias and an activation, as the paper's text has it (which activation it does
            not say: ReLU is chosen here); "linear" with neither, as in the authors' code.
    Call Args: h_TBD, x_TBD.
    Returns: z_TBD.
    """

    itself_TT: Tensor

    def __init__(self, num_tasks: int, seen_dim: int, dim: int, projection: Literal["relu", "linear"] = "relu") -> None:
        super().__init__()
        self.gate = StackedLinear(num_tasks, seen_dim, num_tasks, bias=False)
        self.activation = nn.ReLU() if projection == "relu" else nn.Identity()
        self.project = StackedLinear(num_tasks, dim, 3 * dim, bias=projection == "relu")  # Q, K and V in one product
        with torch.no_grad():
            self.project.weight_SDH[:, :, 2 * dim :] = torch.eye(dim)
            if self.project.bias_SH is not None:
                self.project.bias_SH[:, 2 * dim :] = 0
        self.register_buffer("itself_TT", torch.eye(num_tasks, dtype=torch.bool), persistent=False)

    def forward(self, h_TBD: Tensor, x_TBD: Tensor) -> Tensor:
        share_T2B, value_T2BD, _ = self.attend(h_TBD, x_TBD)
        return (share_T2B.unsqueeze(3) * value_T2BD).sum(1)

    def attend(self, h_TBD: Tensor, x_TBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares c of the task and of the picked one, share_T2B; their values V, value_T2BD; the picked, index_TB1."""
        log_gate_TBT = self.gate(x_TBD).log_softmax(-1)
        index_TB1 = log_gate_TBT.masked_fill(self.itself_TT.unsqueeze(1), -torch.inf).argmax(-1, keepdim=True)
        log_gate_TB1 = log_gate_TBT.gather(-1, index_TB1)
        # Of logarithms, because f itself underflows to 0 where the task's own gate is far above all others.
        factor_TB1 = (log_gate_TB1 - log_gate_TB1.detach()).exp()
        picked_TBD = factor_TB1 * h_TBD.gather(0, index_TB1.expand_as(h_TBD))
        pair_TXD = torch.cat([h_TBD, picked_TBD], 1)
        project_T2BD3 = self.activation(self.project(pair_TXD)).unflatten(1, (2, -1))
        query_T2BD, key_T2BD, value_T2BD = project_T2BD3.chunk(3, -1)
        share_T2B = ((query_T2BD * key_T2BD).sum(-1) / math.sqrt(h_TBD.shape[-1])).softmax(1)
        return share_T2B, value_T2BD, index_TB1


class KnowledgeFusion(nn.Module):
    """One level: components, mixed within each task by its gate, then merged with another task's (section III-B, eq. 1-6).

    Components differ in depth and inner widths, so they are a loop over models and no batched product.

    Args:
        tasks: of each model. in_dims: D in of each component. widths: of their layers, the last the same for all.
        num_tasks: T. seen_dim: width of what the gates read. merge: whether tasks are merged.
        projection: see Merge.
    Call Args:
        x_M: input of each component, (B, D). seen_TBD: what each task's gates read.
    Returns: z_TBD.
    """

    others_TM: Tensor

    def __init__(
        self, tasks: Sequence[int], in_dims: Sequence[int], widths: Sequence[Sequence[int]], num_tasks: int,
        seen_dim: int, merge: bool, projection: Literal["relu", "linear"],
    ) -> None:  # fmt: skip
        super().__init__()
        self.components = nn.ModuleList(StackedMLP(1, d, w) for d, w in zip(in_dims, widths, strict=True))
        self.gate = StackedLinear(num_tasks, seen_dim, len(tasks), bias=False)
        self.merge = Merge(num_tasks, seen_dim, widths[0][-1], projection) if merge and num_tasks > 1 else None
        others_TM = torch.arange(num_tasks).unsqueeze(1) != torch.tensor(tasks)
        self.register_buffer("others_TM", others_TM, persistent=False)

    def forward(self, x_M: Sequence[Tensor], seen_TBD: Tensor) -> Tensor:
        h_TBD = self.mixed(x_M, seen_TBD)
        return h_TBD if self.merge is None else self.merge(h_TBD, seen_TBD)

    def mixed(self, x_M: Sequence[Tensor], seen_TBD: Tensor) -> Tensor:
        """h_TBD: what each task's own models make of their inputs (eq. 1, 2)."""
        h_MBD = torch.cat([component(x_BD.unsqueeze(0)) for component, x_BD in zip(self.components, x_M, strict=True)])
        return mix(self.task_gate(seen_TBD), h_MBD)

    def task_gate(self, seen_TBD: Tensor) -> Tensor:
        """gate_TBM: softmax over the task's own models."""
        return self.gate(seen_TBD).masked_fill(self.others_TM.unsqueeze(1), -torch.inf).softmax(-1)

    def weights(self, x_M: Sequence[Tensor], seen_TBD: Tensor) -> Tensor:
        """weight_TBM of each model in each task: the task gates', by the shares of the task and of the one it picked."""
        gate_TBM = self.task_gate(seen_TBD)
        if self.merge is None:
            return gate_TBM
        share_T2B, _, index_TB1 = self.merge.attend(self.mixed(x_M, seen_TBD), seen_TBD)
        picked_TBM = gate_TBM.gather(0, index_TB1.expand_as(gate_TBM))
        return share_T2B[:, 0].unsqueeze(2) * gate_TBM + share_T2B[:, 1].unsqueeze(2) * picked_TBM


class EMM(Fusion):
    """Trained single-task models as one multi-task model (EMM, section III, Algorithms 1 and 2).

    Models are cut wherever a layer's width is common to all (models.fusion.decomposition); the components of a level are
    fused, and every component of a task reads at the next level what was fused for the task below. As Algorithm 2 calls a
    level with Z in the place of x, so do its gates: they read all of x at the first level and the task's own Z above.
    They have no bias.

    Args:
        in_dim: D in. num_tasks: T.
        models: M of them, at least one of each task. x is the concatenation of their inputs, in this order.
        one_input: all models read the whole x instead.
        merge: False leaves the exchange between tasks out (Table II). projection: of Q, K and V, see Merge.
    Attributes:
        widths: for each model those of its component at every level. remainders: those of its layers above the last cut.
    Shapes: x_BD -> h_BTD.
    Raises:
        UserError: the models share no layer width, or their inputs are not those of x.
    """

    def __init__(
        self, in_dim: int, num_tasks: int, models: Sequence[TrainedModel], one_input: bool = False, merge: bool = True,
        projection: Literal["relu", "linear"] = "relu",
    ) -> None:  # fmt: skip
        super().__init__()
        self.tasks, self.num_tasks = [model.task for model in models], num_tasks
        self.names = [model.name for model in models]
        in_dims = [model.in_dim for model in models]
        if wrong := [m for m in models if one_input and m.in_dim != in_dim]:
            raise UserError(
                f"model.fusion.tables: {wrong[0].name} was trained on an input of width {wrong[0].in_dim}, the new one has "
                f"{in_dim}. Give this model the same interaction and numeric_dim, or keep the trained tables."
            )
        ends = [sum(in_dims[: m + 1]) for m in range(len(models))]
        ranges = zip([0, *ends], ends, strict=False)
        self.columns = [slice(0, in_dim)] * len(models) if one_input else [slice(*ends) for ends in ranges]
        parts = decompose(models)
        self.widths, self.remainders = [part[:-1] for part in parts], [part[-1] for part in parts]
        self.out_dim = self.widths[0][-1][-1]
        self.levels = nn.ModuleList()
        seen_dim = in_dim
        for widths_M in zip(*self.widths, strict=True):
            self.levels.append(KnowledgeFusion(self.tasks, in_dims, widths_M, num_tasks, seen_dim, merge, projection))
            seen_dim = widths_M[0][-1]
            in_dims = [seen_dim] * len(models)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_M, seen_TBD = self._first(x_BD)
        for level in self.levels:
            x_M, seen_TBD = self._next(level(x_M, seen_TBD))
        return seen_TBD.transpose(0, 1)

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """Weights of the trained models per level: weight_BTM; part of it on those of the task that it picks."""
        x_M, seen_TBD = self._first(x_BD)
        weights = []
        for level in self.levels:
            assert isinstance(level, KnowledgeFusion)
            weights.append(level.weights(x_M, seen_TBD).transpose(0, 1))
            x_M, seen_TBD = self._next(level(x_M, seen_TBD))
        return weights

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Tasks mix the components of the trained models."""
        return [GateNames(list(tasks), self.names)] * len(self.levels)

    def freeze(self) -> None:
        """Takes the components out of training; gates and merges stay in it."""
        for level in self.levels:
            assert isinstance(level, KnowledgeFusion)
            level.components.requires_grad_(False)

    def _first(self, x_BD: Tensor) -> tuple[list[Tensor], Tensor]:
        return [x_BD[:, columns] for columns in self.columns], x_BD.unsqueeze(0)

    def _next(self, z_TBD: Tensor) -> tuple[list[Tensor], Tensor]:
        by_task = z_TBD.unbind()  # unlike slices, with one gradient for all
        return [by_task[task] for task in self.tasks], z_TBD
