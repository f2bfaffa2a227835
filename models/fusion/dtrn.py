"""Deep task-specific bottom representation (DTRN; Liu et al., CIKM 2023, arXiv 2308.05996)."""

# Shapes: B rows, T tasks, F features, K features that are behaviours, W width of a token, C width of what conditions,
# D width out.

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from features.errors import UserError
from models.excitation import Excitation
from models.fusion.fusion import Fusion
from models.layers import StackedMLP


class TaskInterests(nn.Module):
    """What each behaviour says about the user's interest for each task.

    x + V relu(U (g * norm(x) + b)): all share U and V; g and b belong to the pair of task and behaviour and come from one
    small network of the embeddings of the two, so that a pair costs no parameter of its own.

    Args:
        num_tasks, num_behaviours: T and K. dim: W. condition: C. hidden: width between U and V, and in the hypernetwork.
    Shapes: x_BKW -> interest_TBKW.
    """

    def __init__(self, num_tasks: int, num_behaviours: int, dim: int, condition: int, hidden: int) -> None:
        super().__init__()
        self.task_TC = nn.Parameter(torch.randn(num_tasks, condition))
        self.behaviour_KC = nn.Parameter(torch.randn(num_behaviours, condition))
        self.task_layer, self.behaviour_layer = nn.Linear(condition, hidden), nn.Linear(condition, hidden, bias=False)
        self.generate = nn.Linear(hidden, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BKW: Tensor) -> Tensor:
        # One layer on the two embeddings side by side, as the sum of its two halves.
        pair_TKH = torch.relu(self.task_layer(self.task_TC).unsqueeze(1) + self.behaviour_layer(self.behaviour_KC))
        scale_T1KW, shift_T1KW = self.generate(pair_TKH).unsqueeze(1).chunk(2, 3)
        y_TBKW = (1 + scale_T1KW) * self.norm(x_BKW) + shift_T1KW
        return x_BKW + self.down(torch.relu(self.up(y_TBKW)))


class DTRN(Fusion):
    """A bottom for each task: its own reading of the behaviours, its own weight of each feature, then its own network.

    From the paper's public text (abstract, summaries): one hypernetwork, few parameters, reads the user's interests out of
    every kind of behaviour sequence for every task: conditioned on task and kind, it makes the scale and shift of the layer
    norms of a transformer over the sequence. A network like SENet a task then weighs each feature.

    Chosen here: a behaviour is a bag feature and arrives as the mean of its items, so the transformer sees a sequence of
    one, where attention has nothing to choose: its feed-forward half remains, x + f(conditional norm(x)). (A map
    without f would commute with the mean but be one with the first layer of the task's own network.) Weights of features
    are in (0, 2). On top, where any method may stand, there is a network a task.

    Args:
        in_dim: W. num_tasks: T. num_fields: F. widths: of each task's network, the last is D.
        behaviours: the features that are behaviours (in a config by name); None: none, then only the weighing remains.
        condition: width of the embeddings of tasks and behaviours. hidden: inside the hypernetwork and f.
        squeeze: inside the networks that weigh features.
    Shapes: x_BFW -> h_BTD.
    Raises:
        UserError: a behaviour that is named twice.
    """

    fields = True
    field_arguments = ("behaviours",)
    behaviour_K: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, widths: Sequence[int],
        behaviours: Sequence[int] | None = None, condition: Annotated[int, Field(ge=1)] = 8,
        hidden: Annotated[int, Field(ge=1)] = 32, squeeze: Annotated[int, Field(ge=1)] = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        chosen = list(behaviours or [])
        if len(set(chosen)) < len(chosen):
            raise UserError("model.fusion.behaviours: names a feature twice, name each once")
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        self.register_buffer("behaviour_K", torch.tensor(chosen, dtype=torch.int64), persistent=False)
        self.interests = TaskInterests(num_tasks, len(chosen), in_dim, condition, hidden) if chosen else None
        self.excitation = Excitation(num_tasks, num_fields, squeeze)
        self.networks = StackedMLP(num_tasks, num_fields * in_dim, widths)

    def forward(self, x_BFW: Tensor) -> Tensor:
        x_TBFW = self._read(x_BFW)
        x_TBFW = x_TBFW * self.excitation(x_TBFW).unsqueeze(3)
        return self.networks(x_TBFW.flatten(2)).transpose(0, 1)

    def _read(self, x_BFW: Tensor) -> Tensor:
        """Each task's tokens: the behaviours as it reads them, the others as they are."""
        x_TBFW = x_BFW.expand(self.num_tasks, -1, -1, -1)
        if self.interests is None:
            return x_TBFW
        return x_TBFW.index_copy(2, self.behaviour_K, self.interests(x_BFW[:, self.behaviour_K]))

    def gates(self, x_BFW: Tensor) -> list[Tensor]:
        """One level: each task's weight of each feature, weight_BTF in (0, 2)."""
        return [self.excitation(self._read(x_BFW)).transpose(0, 1)]
