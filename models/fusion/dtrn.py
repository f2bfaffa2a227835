"""Deep task-specific bottom representation (DTRN; Liu et al., CIKM 2023, arXiv 2308.05996)."""

# Shapes: B rows, T tasks, F features, K features that are behaviours, J of them sequences, L items of the longest, S = 1 + L,
# W width of a token, C width of what conditions, H width between, D width out.

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from features.errors import UserError
from models.excitation import Excitation
from models.fusion.fusion import Fusion, GateNames
from models.layers import PLAIN_EXPERTS, ExpertLayers, Widths
from models.sequences import WithItems


class ItemAttention(nn.Module):
    """What each task's reading of a sequence takes from its items: A z, where z is their mean under softmax(q y / sqrt(W)).

    y = g * norm(x + place) + b, of the sequence's own token and then its items; q = Q y of the first. A head's query and key
    act as one matrix, Q, and so do its value and output, A. g and b belong to the pair of task and behaviour.

    Args:
        dim: W. hidden: H. length: L.
    Shapes: x_BJW, item_BJLW, present_BJL, pair_TJH -> read_TBJW.
    """

    def __init__(self, dim: int, hidden: int, length: int) -> None:
        super().__init__()
        self.place_SW = nn.Parameter(0.02 * torch.randn(1 + length, dim))
        self.generate = nn.Linear(hidden, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ask, self.answer = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_BJW: Tensor, item_BJLW: Tensor, present_BJL: Tensor, pair_TJH: Tensor) -> Tensor:
        scale_T1JW, shift_T1JW = self.generate(pair_TJH).unsqueeze(1).chunk(2, 3)
        y_BJSW = self.norm(torch.cat([x_BJW.unsqueeze(2), item_BJLW], 2) + self.place_SW)
        present_BJS = nn.functional.pad(present_BJL, (1, 0), value=True)
        ask_TBJW = self.ask((1 + scale_T1JW) * y_BJSW[:, :, 0] + shift_T1JW)
        # Scale and shift are the same for all items, so they act on the query and on the sum read, not on each item for
        # each task; and a shift moves all scores alike, which softmax does not see.
        score_TBJS = torch.einsum("tbjw,bjsw->tbjs", (1 + scale_T1JW) * ask_TBJW, y_BJSW) / y_BJSW.shape[3] ** 0.5
        weight_TBJS = score_TBJS.masked_fill(~present_BJS, -torch.inf).softmax(3)
        read_TBJW = torch.einsum("tbjs,bjsw->tbjw", weight_TBJS, y_BJSW)
        return self.answer((1 + scale_T1JW) * read_TBJW + shift_T1JW)


class TaskInterests(nn.Module):
    """The user's interest in each task, read from each behaviour.

    x + V relu(U (g * norm(x) + b)): all share U and V; g and b belong to the pair of task and behaviour and come from one
    small network of the embeddings of the two, so that a pair costs no parameter of its own. A behaviour that is a sequence
    first takes from its items (ItemAttention); one that is not is a sequence of one, where there is nothing to choose.

    Args:
        num_tasks, num_behaviours: T and K. dim: W. condition: C. hidden: H, between U and V, and in the hypernetwork.
        sequences: which of the behaviours are. length: L.
    Shapes: x_BKW, item_BJLW, present_BJL -> interest_TBKW.
    """

    sequence_J: Tensor

    def __init__(
        self, num_tasks: int, num_behaviours: int, dim: int, condition: int, hidden: int,
        sequences: Sequence[int] = (), length: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_tasks = num_tasks
        self.task_TC = nn.Parameter(torch.randn(num_tasks, condition))
        self.behaviour_KC = nn.Parameter(torch.randn(num_behaviours, condition))
        self.task_layer, self.behaviour_layer = nn.Linear(condition, hidden), nn.Linear(condition, hidden, bias=False)
        self.generate = nn.Linear(hidden, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.register_buffer("sequence_J", torch.tensor(list(sequences), dtype=torch.int64), persistent=False)
        self.attention = ItemAttention(dim, hidden, length) if sequences else None

    def forward(self, x_BKW: Tensor, item_BJLW: Tensor | None = None, present_BJL: Tensor | None = None) -> Tensor:
        # One layer on the two concatenated embeddings, as the sum of its two halves.
        pair_TKH = torch.relu(self.task_layer(self.task_TC).unsqueeze(1) + self.behaviour_layer(self.behaviour_KC))
        scale_T1KW, shift_T1KW = self.generate(pair_TKH).unsqueeze(1).chunk(2, 3)
        x_TBKW = x_BKW.expand(self.num_tasks, -1, -1, -1)
        if self.attention is not None:
            x_BJW, pair_TJH = x_BKW[:, self.sequence_J], pair_TKH[:, self.sequence_J]
            read_TBJW = self.attention(x_BJW, item_BJLW, present_BJL, pair_TJH)
            x_TBKW = x_TBKW.index_add(2, self.sequence_J, read_TBJW.to(x_BKW.dtype))
        y_TBKW = (1 + scale_T1KW) * self.norm(x_TBKW) + shift_T1KW
        return x_TBKW + self.down(torch.relu(self.up(y_TBKW)))


class DTRN(Fusion):
    """A bottom for each task: its own reading of the behaviours, its own weight of each feature, then its own network.

    The paper's full text was not reachable here. From its abstract and summaries: one hypernetwork, few parameters, reads
    the user's interests out of every kind of behaviour sequence for every task: conditioned on task and kind, it makes the
    scale and shift of the layer norms of a transformer over the sequence. A network like SENet a task then weighs each feature.

    Chosen here: one block of one head, whose norms come first, over the sequence's own token and its items, latest first, with
    an embedding of their place. Its output at the first place is the interest, so only that place has a query (the others'
    outputs would be unused); its token depends on the candidate (models.sequences.Interests). A bag that is not a sequence
    is its mean, a sequence of one, where attention has nothing to choose: the feed-forward half remains,
    x + f(conditional norm(x)). (A map without f would commute with the mean but be one with the first layer of the task's
    own network.) Weights of features are in (0, 2). On top, where the paper allows any method, there is a network a task.

    Args:
        in_dim: W. num_tasks: T. num_fields: F.
        sequences: of each feature that is a sequence, the most items it may have.
        widths: of each task's network, the last is D.
        behaviours: the features that are behaviours (in a config by name); None: those that are sequences. Without any, only
            the weighing remains.
        condition: width of the embeddings of tasks and behaviours. hidden: inside the hypernetwork and f.
        squeeze: inside the networks that weigh features.
        experts: layers of the tasks' networks, by default linear and ReLU.
    Shapes: x_BFW, or WithItems where a feature is a sequence -> h_BTD.
    Raises:
        UserError: a behaviour that is named twice.
    """

    fields = True
    sequences = True
    field_arguments = ("behaviours",)
    behaviour_K: Tensor
    read_J: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, sequences: Mapping[int, int], widths: Widths,
        behaviours: Sequence[int] | None = None, condition: Annotated[int, Field(ge=1)] = 8,
        hidden: Annotated[int, Field(ge=1)] = 32, squeeze: Annotated[int, Field(ge=1)] = 16,
        experts: ExpertLayers = PLAIN_EXPERTS,
    ) -> None:  # fmt: skip
        super().__init__()
        chosen = list(sequences if behaviours is None else behaviours)
        if len(set(chosen)) < len(chosen):
            raise UserError("model.fusion.behaviours: names a feature twice, name each once")
        self.num_tasks, self.out_dim = num_tasks, widths[-1]
        read = [place for place, feature in enumerate(chosen) if feature in sequences]
        read_J = [list(sequences).index(chosen[place]) for place in read]
        self.register_buffer("behaviour_K", torch.tensor(chosen, dtype=torch.int64), persistent=False)
        self.register_buffer("read_J", torch.tensor(read_J, dtype=torch.int64), persistent=False)
        inner = (len(chosen), in_dim, condition, hidden, read, max(sequences.values(), default=0))
        self.interests = TaskInterests(num_tasks, *inner) if chosen else None
        self.excitation = Excitation(num_tasks, num_fields, squeeze)
        self.networks = experts.stack(num_tasks, num_fields * in_dim, widths)

    def forward(self, x: Tensor | WithItems) -> Tensor:
        x_TBFW = self._read(x)
        x_TBFW = x_TBFW * self.excitation(x_TBFW).unsqueeze(3)
        return self.networks(x_TBFW.flatten(2)).transpose(0, 1)

    def _read(self, x: Tensor | WithItems) -> Tensor:
        """Each task's tokens: the behaviours as it reads them, the others as they are."""
        x_BFW, items = (x.x_BFW, x[1:]) if isinstance(x, WithItems) else (x, ())
        x_TBFW = x_BFW.expand(self.num_tasks, -1, -1, -1)
        if self.interests is None:
            return x_TBFW
        read = self.interests(x_BFW[:, self.behaviour_K], *(part[:, self.read_J] for part in items))
        return x_TBFW.index_copy(2, self.behaviour_K, read)

    def gates(self, x: Tensor | WithItems) -> list[Tensor]:
        """One level: each task's weight of each feature, weight_BTF in (0, 2)."""
        return [self.excitation(self._read(x)).transpose(0, 1)]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:
        """Tasks weigh features."""
        return [GateNames(list(tasks), list(features))]
