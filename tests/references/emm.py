"""Reference of EMM, written from the paper's equations (section III-B): see layers.py."""

# Shapes: B rows, T tasks, M models, D width, 2 a task and the one that it picked.

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from references.layers import Pair, Reference, linear_pairs, mixed, mlp, mlp_pairs
from torch import Tensor, nn


class EMM(Reference):
    """Components of single-task models, mixed within each task (eq. 1, 2) and merged with the task picked (eq. 3-6).

    Args:
        models: each has `task` and `in_dim`, the columns of x that it reads: all, or, `one_input` False, those after the
            models' before it.
        widths: for each level and model the layers of its component. None: each layer of the models is a level.
        projection: "relu" (the text: a layer with an activation) or "linear" (the authors' code: a matrix).
    """

    def __init__(
        self, in_dim: int, num_tasks: int, models: Sequence[Any], one_input: bool = False, merge: bool = True,
        projection: str = "relu", widths: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tasks, self.num_tasks = [model.task for model in models], num_tasks
        ends = [sum(model.in_dim for model in models[: m + 1]) for m in range(len(models))]
        self.columns = [slice(0 if one_input else end - m.in_dim, end) for m, end in zip(models, ends, strict=True)]
        if one_input:
            self.columns = [slice(0, in_dim)] * len(models)
        widths = widths or [[[width] for width in layer] for layer in zip(*(m.widths for m in models), strict=True)]
        outers = [level[0][-1] for level in widths]
        self.out_dim, inners = outers[-1], [[m.in_dim for m in models], *([d] * len(models) for d in outers)]
        self.components = nn.ModuleList(
            nn.ModuleList(mlp([d, *w]) for d, w in zip(dims, level, strict=True))
            for dims, level in zip(inners, widths, strict=False)
        )
        seen_dims = [in_dim, *outers[:-1]]
        self.merge = merge and num_tasks > 1
        self.gate, self.pick = (
            nn.ModuleList(
                nn.ModuleList(nn.Linear(d, len(sees(task)), bias=False) for task in range(num_tasks)) for d in seen_dims
            )
            for sees in (self.own, lambda task: range(num_tasks))
        )
        self.attention = nn.ModuleList(  # Q, K and V of every task
            nn.ModuleList(
                nn.ModuleList(nn.Linear(d, d, bias=projection == "relu") for _ in range(3)) for _ in range(num_tasks)
            )
            for d in outers
        )
        self.activation = torch.relu if projection == "relu" else lambda value_BD: value_BD

    def own(self, task: int) -> list[int]:
        return [model for model, of in enumerate(self.tasks) if of == task]

    def run(self, x_BD: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        inputs, z, shares = [x_BD[:, columns] for columns in self.columns], [x_BD] * self.num_tasks, []
        for level, components in enumerate(self.components):
            out = [component(input_BD) for component, input_BD in zip(components, inputs, strict=True)]
            weights = [gate(z[task]).softmax(1) for task, gate in enumerate(self.gate[level])]
            h = [
                mixed(weight_BM, torch.stack([out[m] for m in self.own(task)], 1))
                for task, weight_BM in enumerate(weights)
            ]
            merged = [(h_BD, None, None) for h_BD in h]
            if self.merge:
                merged = [self.merged(level, task, h, z[task]) for task in range(self.num_tasks)]
            shares.append([(weight_BM, *how) for weight_BM, (_, *how) in zip(weights, merged, strict=True)])
            h = [z_BD for z_BD, *_ in merged]
            z, inputs = h, [h[task] for task in self.tasks]  # Algorithm 2
        return z, shares

    def merged(self, level: int, task: int, h: list[Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 3-6: z_BD, the shares of the task and of the other that it picked, share_B2, and which that is, index_B."""
        other = [t for t in range(self.num_tasks) if t != task]
        q, k, v = (lambda w_BD, of=of: self.activation(of(w_BD)) for of in self.attention[level][task])
        largest_B, index_B = self.pick[level][task](x_BD).softmax(1)[:, other].max(1)
        other_BTD = torch.stack([h[t] for t in other], 1)
        factor_B = largest_B / largest_B.detach()  # 1, so that the gate gets a gradient and h_picked no factor
        picked_BD = factor_B.unsqueeze(1) * other_BTD[torch.arange(len(index_B)), index_B]
        both = [h[task], picked_BD]
        scores = [(q(w_BD) * k(w_BD)).sum(1) / w_BD.shape[1] ** 0.5 for w_BD in both]
        share_B2 = torch.stack(scores, 1).softmax(1)
        z_BD = share_B2[:, :1] * v(both[0]) + share_B2[:, 1:] * v(both[1])
        return z_BD, share_B2, index_B

    def gates(self, x_BD: Tensor) -> list[Tensor]:
        """How much of each model is in each task: weight_BTM."""
        found = []
        for shares in self.run(x_BD)[1]:
            gate_BTM = x_BD.new_zeros(len(x_BD), self.num_tasks, len(self.tasks))
            for task, (weight_BM, *_) in enumerate(shares):
                gate_BTM[:, task, self.own(task)] = weight_BM
            weight_BTM = gate_BTM.clone()
            for task, (_, share_B2, index_B) in enumerate(shares if self.merge else []):
                picked_B = index_B + (index_B >= task)  # among all tasks
                picked_BM = gate_BTM[torch.arange(len(x_BD)), picked_B]
                weight_BTM[:, task] = share_B2[:, :1] * gate_BTM[:, task] + share_B2[:, 1:] * picked_BM
            found.append(weight_BTM)
        return found

    def pairs(self, module: Any) -> Iterator[Pair]:
        for level, theirs in enumerate(module.levels):
            for component, one in zip(self.components[level], theirs.components, strict=True):
                yield from mlp_pairs([component], one)
            for task, gate in enumerate(self.gate[level]):
                own = self.own(task)
                weight = theirs.gate.weight_SDH
                yield gate.weight, weight, lambda weight_SDH, task=task, own=own: weight_SDH[task][:, own].t()
            for task in range(self.num_tasks if self.merge else 0):
                yield from linear_pairs(self.pick[level][task], theirs.merge.gate, task)
                for index, linear in enumerate(self.attention[level][task]):
                    part = slice(index * len(linear.weight), (index + 1) * len(linear.weight))
                    weight, bias = theirs.merge.project.weight_SDH, theirs.merge.project.bias_SH
                    yield linear.weight, weight, lambda weight, task=task, part=part: weight[task][:, part].t()
                    if bias is not None:
                        yield linear.bias, bias, lambda bias, task=task, part=part: bias[task, part]
