"""Two facets of causal attention: over the features of an example, and over examples of several tasks (AutoTask)."""

# Shapes: B rows, T tasks, F features, D width of a feature's token, I width of a task id, K tasks that a row is scored for,
# N examples or sequences, S places of a sequence, W width in attention, H heads.

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from models.fusion.fusion import Fusion, GateNames

STD = 0.02  # of initial weights and positions


class GPTBlock(nn.Module):
    """Pre-norm attention and a GELU network of four times the width, then the norm that ends a stack of blocks (GPT-2).

    Weights start as GPT-2's, N(0, 0.02^2) with biases of 0, but for its scaling of residual layers by depth: the paper names
    GPT-2 and no start, and here one block is the whole depth.

    Args:
        width: W, a multiple of heads. heads: H. causal: a place sees itself and those before it, not those after.
    Call Args:
        x_NSW: sequences. mask_NSS: bool, the places that each place sees, in place of what `causal` says.
    Returns: y_NSW.
    """

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_network, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.project = nn.Linear(width, 3 * width)  # queries, keys and values in one product
        self.join = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=STD)
                nn.init.zeros_(layer.bias)

    def forward(self, x_NSW: Tensor, mask_NSS: Tensor | None = None) -> Tensor:
        query, key, value = self._parts(x_NSW)
        mask_N1SS = None if mask_NSS is None else mask_NSS.unsqueeze(1)
        seen_NHSW = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_N1SS, is_causal=self.causal and mask_NSS is None
        )
        x_NSW = x_NSW + self.join(seen_NHSW.transpose(1, 2).flatten(2))
        return self.norm_out(x_NSW + self.network(self.norm_network(x_NSW)))

    def weights(self, x_NSW: Tensor, mask_NSS: Tensor) -> Tensor:
        """weight_NSS of each place on each other, the mean over heads."""
        query_NHSW, key_NHSW, _ = self._parts(x_NSW)
        score_NHSS = query_NHSW @ key_NHSW.transpose(2, 3) / math.sqrt(query_NHSW.shape[3])
        return score_NHSS.masked_fill(~mask_NSS.unsqueeze(1), -torch.inf).softmax(3).mean(1)

    def _parts(self, x_NSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.project(self.norm_attention(x_NSW)).unflatten(2, (3, self.heads, -1))
        query_NHSW, key_NHSW, value_NHSW = parts.permute(2, 0, 3, 1, 4)
        return query_NHSW, key_NHSW, value_NHSW


class AutoTask(Fusion):
    """Features as a causal sequence with the task's id, and examples of several tasks as another (arXiv 2407.06549).

    An example is a row with one of its tasks. Facet 1 attends over its features: each token is [feature; task id], to
    which a learnt embedding of its position is added; the tokens that come out are flattened. Facet 2 attends over a
    block of examples: each token is a linear layer of [all features of the row, flattened; task id], without positions,
    so that a block may hold any tasks in any order. Both outputs, concatenated, are h, which one tower reads for every task.

    The paper's blocks are random mixtures of examples: with `examples` "mixed", those of all rows and tasks that are observed
    are shuffled and cut into blocks. Random draws and blocks are of a rank's rows (of a micro-batch of them), so that, as with
    dropout, the number of ranks changes the weights. In evaluation every row is scored for every task alone, as the first of
    a block is in training: a score depends on its row alone. Of N examples, one shares its block with a certain other of
    its row with a chance of (block - 1) / (N - 1); where a task is observed only after another's outcome, that shows the
    outcome, which blocks far smaller than the batch keep rare.

    Left open by the text that was reachable here, and chosen: the size of a block; facet 2 reads the features as they come,
    not as facet 1 leaves them, through a linear layer, which starts as nn.Linear does; one block of GPT-2 per facet, with
    its last norm; no dropout in them.

    Args:
        in_dim: D. num_tasks: T. num_fields: F.
        width: W of facet 2. heads: of both facets; a feature's [token; id] is filled up to a multiple of them and of 8.
        task_id: "onehot", "embedding" (learnt, as wide as the one-hot), or "none".
        causal: False lets every place of a sequence see all others, in both facets.
        block: examples of a block; None: T, where a mixture holds each task about once; 1: no interaction between tasks. Of a
            larger block, fewer examples are trained as they are scored, without others before them.
        examples: "mixed": each row is an example of every task that is observed for it; see above.
            "rows": the same, by its name for logs whose rows belong to one task each.
            "tasks": each row is an example of every task, observed or not, and a block holds tasks of one row, in training
            in random order, in evaluation in the schema's. Nothing crosses rows.
        unseen: tasks that are not learnt: no label of theirs moves a weight. Their id is 0 and they are scored alone.
    Call Args:
        x_BFD: one token a feature. observed_BT: bool, given unless `examples` is "tasks", and read in training.
    Returns: h_BTD; in training, 0 for what is no example.
    Raises:
        UserError: a width that is no multiple of heads, or no task that is not unseen.
    """

    fields = True
    shared_tower = True
    task_arguments = ("unseen",)
    id_TI: Tensor
    unseen_T: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, width: Annotated[int, Field(ge=1)],
        heads: Annotated[int, Field(ge=1)] = 1, task_id: Literal["onehot", "embedding", "none"] = "onehot",
        causal: bool = True, block: Annotated[int, Field(ge=1)] | None = None,
        examples: Literal["tasks", "mixed", "rows"] = "tasks", unseen: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise UserError(f"model.fusion.width: {width} is not a multiple of heads, which is {heads}")
        self.causal, self.reads_observed, self.block = causal, examples != "tasks", block or num_tasks
        if self.reads_observed:
            self.varying = "takes as many examples from a batch as labels are observed (model.fusion.examples)"
        if len(set(unseen)) == num_tasks:
            raise UserError("model.fusion.unseen: holds out every task; leave one to learn from")
        self.unseen = list(unseen)
        unseen_T = torch.zeros(num_tasks, dtype=torch.bool)
        unseen_T[self.unseen] = True
        self.register_buffer("unseen_T", unseen_T, persistent=False)
        ids = 0 if task_id == "none" else num_tasks
        if task_id == "embedding":
            self.id_TI = nn.Parameter(torch.randn(num_tasks, ids) / math.sqrt(ids))  # as long as a one-hot on average
        else:
            self.register_buffer("id_TI", torch.eye(num_tasks, ids), persistent=False)
        unit = math.lcm(heads, 8)  # matrix products are fastest at multiples of 8
        inner = math.ceil((in_dim + ids) / unit) * unit
        self.position_FW = nn.Parameter(torch.randn(num_fields, inner) * STD)
        self.over_features = GPTBlock(inner, heads, causal)
        self.example = nn.Linear(num_fields * in_dim + ids, width)
        self.over_examples = GPTBlock(width, heads, causal)
        self.out_dim = num_fields * inner + width

    def forward(self, x_BFD: Tensor, observed_BT: Tensor | None = None) -> Tensor:
        if not self.training:
            return self._blocks(x_BFD, self._ids(), self.unseen_T)
        if observed_BT is not None:
            return self._observed(x_BFD, observed_BT)
        return self._blocks(x_BFD, self._ids(), self.unseen_T, self._order(len(x_BFD), len(self.unseen_T)))

    def forward_tasks(self, x_BFD: Tensor, tasks: Sequence[int]) -> Tensor:
        """h_BKD of these tasks alone, each after those before it in this list; one task is single-task inference."""
        chosen = list(tasks)
        return self._blocks(x_BFD, self._ids()[chosen], self.unseen_T[chosen])

    def gates(self, x_BFD: Tensor) -> list[Tensor]:
        """One level, weight_BTT of facet 2, the mean over heads: of each task on the tasks it sees in evaluation."""
        return [self.over_examples.weights(self._examples(x_BFD, self._ids()), self._sees(self.unseen_T))]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:  # noqa: ARG002
        """Tasks attend to tasks."""
        return [GateNames(list(tasks), list(tasks))]

    def detach_unseen(self, out_KBT: Tensor) -> Tensor:
        """The outputs, those of unseen tasks without a gradient."""
        return torch.where(self.unseen_T, out_KBT.detach(), out_KBT)

    def start(self, start_KT: Tensor) -> Tensor:
        """The outputs' biases at the start; an unseen task's is the mean of the others."""
        mean_K1 = start_KT[:, ~self.unseen_T.cpu()].mean(1, keepdim=True)
        return torch.where(self.unseen_T.cpu(), mean_K1, start_KT)

    def _blocks(self, x_BFD: Tensor, id_KI: Tensor, unseen_K: Tensor, order_BK: Tensor | None = None) -> Tensor:
        """h_BKD of every row with each of K tasks, which share blocks."""
        cross_BKW = self.over_examples(self._examples(x_BFD, id_KI), self._sees(unseen_K, order_BK))
        return torch.cat([self._features(x_BFD, id_KI), cross_BKW], 2)

    def _observed(self, x_BFD: Tensor, observed_BT: Tensor) -> Tensor:
        """h_BTD of what is observed, in blocks across rows."""
        row_N, task_N = (observed_BT & ~self.unseen_T).nonzero(as_tuple=True)
        order_N = self._order(1, len(row_N))[0].argsort()
        row_N, task_N = row_N[order_N], task_N[order_N]
        x_NFD, id_N1I = x_BFD[row_N], self._ids()[task_N].unsqueeze(1)
        blocks = math.ceil(len(row_N) / self.block)
        places = blocks * self.block
        example_NW = functional.pad(self._examples(x_NFD, id_N1I).squeeze(1), (0, 0, 0, places - len(row_N)))
        example_NSW = example_NW.view(blocks, self.block, example_NW.shape[1])
        # The last block's empty places come after its others, which causal attention does not reach.
        filled_N1S = (torch.arange(places, device=row_N.device) < len(row_N)).view(blocks, 1, self.block)
        mask_NSS = None if self.causal else filled_N1S.expand(-1, self.block, -1)
        cross_NSW = self.over_examples(example_NSW, mask_NSS)
        h_ND = torch.cat([self._features(x_NFD, id_N1I).squeeze(1), cross_NSW.flatten(0, 1)[: len(row_N)]], 1)
        return h_ND.new_zeros(*observed_BT.shape, self.out_dim).index_put((row_N, task_N), h_ND)

    def _ids(self) -> Tensor:
        return self.id_TI.masked_fill(self.unseen_T.unsqueeze(1), 0)

    def _order(self, sequences: int, length: int) -> Tensor:
        """Random numbers in [0, 1), order_NS: the smaller, the earlier in its sequence."""
        return torch.rand(sequences, length, device=self.unseen_T.device)

    def _features(self, x_NFD: Tensor, id_NKI: Tensor) -> Tensor:
        """Facet 1, flattened, of each row with each of its ids; id_KI where these are the same for all rows."""
        (rows, num_fields, dim), (tasks, ids), inner = x_NFD.shape, id_NKI.shape[-2:], self.position_FW.shape[1]
        position_FD, position_FI = self.position_FW.split([dim, inner - dim], 1)
        # Positions are added before the copies for every row and task are made.
        own_N1FD = (x_NFD + position_FD).unsqueeze(1)
        id_NKFI = functional.pad(id_NKI, (0, inner - dim - ids)).unsqueeze(-2) + position_FI
        shape = (rows, tasks, num_fields, -1)
        token_NKFW = torch.cat([own_N1FD.expand(shape), id_NKFI.expand(shape)], 3)
        return self.over_features(token_NKFW.flatten(0, 1)).view(rows, tasks, num_fields * inner)

    def _examples(self, x_NFD: Tensor, id_NKI: Tensor) -> Tensor:
        """Tokens of facet 2, example_NKW: one linear layer of [features; id], the features' part once for all ids."""
        own_NF = x_NFD.flatten(1)
        weight_WF, weight_WI = self.example.weight.split([own_NF.shape[1], id_NKI.shape[-1]], 1)
        row_NW = functional.linear(own_NF, weight_WF, self.example.bias)
        return row_NW.unsqueeze(1) + functional.linear(id_NKI, weight_WI)

    def _sees(self, unseen_K: Tensor, order_NK: Tensor | None = None) -> Tensor:
        """mask_NKK of facet 2, which has no positions: which tasks of the row each sees is all that order and blocks do.

        order_NK: as `_order` gives it; None: the schema's order.
        """
        size = 1 if self.reads_observed else self.block
        if order_NK is None:
            order_NK = torch.linspace(0, 1, len(unseen_K), device=unseen_K.device).unsqueeze(0)
        rank_NK = (order_NK + 2 * unseen_K).argsort(1).argsort(1)  # unseen tasks take no place in the others' blocks
        block_NK = torch.where(unseen_K, -1 - rank_NK, rank_NK // size)
        sees_NKK = block_NK.unsqueeze(2) == block_NK.unsqueeze(1)
        return sees_NKK & (rank_NK.unsqueeze(2) >= rank_NK.unsqueeze(1)) if self.causal else sees_NKK
