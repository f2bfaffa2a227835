"""MultiTab-Net: feature tokens, task tokens and a mask between them (arXiv 2511.09970)."""

# Shapes: B rows, T tasks, F features, W width of a token, S = T + F tokens (the tasks first), N sequences, P places of one,
# Q places with a query, D width in a block, H heads, V = D / H.

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from features.errors import UserError
from models.fusion.fusion import Fusion, GateNames

Mask = Literal["none", "FxT", "TxT", "FxT_TxT"]
Share = Annotated[float, Field(ge=0, lt=1)]


class Block(nn.Module):
    """One pre-norm transformer block that updates the first Q places of a sequence, attending to all.

    z = x + dropout(out(attention(norm(x)))), then z + down(dropout(gelu(up(norm(z))))).

    Args:
        dim: D. heads: share D evenly. hidden: width of the feed-forward layer.
        std: of initial weights, normal with biases of 0; None: as nn.Linear.
        dropout: see above. attention_dropout: of attention weights.
        attends: with `std`, queries, keys and values start as Glorot's uniform of all three in one matrix, as in
            torch.nn.MultiheadAttention. False: each place attends to itself alone, with values but no queries and keys.
    Call Args:
        x_NPD: sequences. allowed_QP: bool, the attention mask; None: all places attend to all.
    Returns: x_NQD.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, std: float | None, dropout: float = 0.0, attention_dropout: float = 0.0,
        attends: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim) if attends else None
        self.value, self.out = nn.Linear(dim, 2 * dim if attends else dim), nn.Linear(dim, dim)  # keys before values
        self.forward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        if std is not None:
            self._start(std)

    def _start(self, std: float) -> None:
        for layer in filter(None, (self.query, self.value, self.out, self.up, self.down)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        if self.query is not None:
            bound = (6 / (self.query.in_features + 3 * self.query.in_features)) ** 0.5
            nn.init.uniform_(self.query.weight, -bound, bound)
            nn.init.uniform_(self.value.weight, -bound, bound)

    def forward(self, x_NPD: Tensor, allowed_QP: Tensor | None = None) -> Tensor:
        own_NQD = x_NPD if allowed_QP is None else x_NPD[:, : allowed_QP.shape[0]]
        z_NQD = own_NQD + self.dropout(self.out(self._attend(x_NPD, allowed_QP)))
        return z_NQD + self.down(self.dropout(functional.gelu(self.up(self.forward_norm(z_NQD)))))

    def _attend(self, x_NPD: Tensor, allowed_QP: Tensor | None) -> Tensor:
        if self.query is None:
            return self.value(self.norm(x_NPD))
        share = self.attention_dropout if self.training else 0.0
        h_NHQV = functional.scaled_dot_product_attention(*self._project(x_NPD, allowed_QP), allowed_QP, share)
        return h_NHQV.transpose(1, 2).flatten(2)

    def weights(self, x_NPD: Tensor, allowed_QP: Tensor) -> Tensor:
        """Attention weights, the mean of the heads: weight_NQP."""
        q_NHQV, k_NHPV, _ = self._project(x_NPD, allowed_QP)
        score_NHQP = q_NHQV @ k_NHPV.transpose(2, 3) / q_NHQV.shape[3] ** 0.5
        return score_NHQP.masked_fill(~allowed_QP, -torch.inf).softmax(3).mean(1)

    def _project(self, x_NPD: Tensor, allowed_QP: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first places, keys and values of all, each head with its part of the width."""
        assert self.query is not None
        y_NPD = self.norm(x_NPD)
        y_NQD = y_NPD if allowed_QP is None else y_NPD[:, : allowed_QP.shape[0]]
        k_NPD, v_NPD = self.value(y_NPD).chunk(2, 2)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query(y_NQD), k_NPD, v_NPD)
        )
        return query, key, value


class MultiTab(Fusion):
    """A transformer over the features of a row and one learnt token a task; a mask keeps tasks apart.

    From the paper's abstract and its authors' code (github.com/Armanfard-Lab/MultiTab, models/mtt.py): a token a feature, a
    learnt token a task, all attending to all but for the mask: "FxT": features do not attend to tasks, "TxT": a task does
    not attend to other tasks (they still meet in features that attend to them), "FxT_TxT": neither, "none": no mask. A
    task's last token feeds its tower; no norm follows the last block. Blocks and the places of dropout are the code's (see
    Block), and so is the start with `std` 0.01. It learns slowly: on a generated log of 80,000 rows, NE of clicks after 236
    steps of 1,024 was 1.06 with it and 0.87 with None, which suits one pass over a stream better.

    In the code each block over features is followed by one over rows, which reads a row as one token of all its own, S W
    wide, with the same heads and hidden width, without a mask. Here it is an option, `rows`:

    "none": left out, so that a score depends on its row alone.
    "alone": each row attends to itself alone, which makes the block a network over all tokens of a row. The code does the
        same with `rope: true` (its AliExpress, Higgs and synthetic configurations): its rotary attention takes the rows of
        a batch for sequences of length 1. Its queries and keys then change nothing, and are left out.
    "batch": rows attend to each other, as with `rope: false` (its ACS Income configuration). A score then depends on the
        rows that share the batch, rows that fill it up among them: in training on those of the rank and micro-batch, so
        that the number of ranks changes the weights, in evaluation on `batch_size` and the order of rows.

    Chosen here: rows "none" with two blocks, since with one no feature would attend to another before it is read, and with
    fewer heads and a smaller hidden width for speed (the authors' configurations: one block, 4 heads, tokens 8 or 16, 256
    hidden, mask TxT on real data). A feature's token comes from its embedding or its numbers through a layer of its own, which
    starts as everywhere in this project, and so do towers. The last block over features updates the tasks' tokens
    only where no block over rows reads the others. Not here: one token for all tasks (the code's `multi_token: false`).

    Args:
        in_dim: W. num_tasks: T. num_fields: F.
        layers: blocks. heads: must divide W. hidden: width of their feed-forward layer. mask, rows: see above.
        std: of initial weights and tokens of tasks; None: as nn.Linear, and N(0, 1) for these tokens.
        dropout: of the first tokens and in blocks (the code's ff_dropout).
        attention_dropout: of attention weights, over rows only where these are "batch", as in the code (att_dropout).
    Shapes: x_BFW -> h_BTW.
    Raises:
        UserError: heads that do not divide W.
    """

    fields = True
    allowed_SS: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, layers: Annotated[int, Field(ge=1)] = 2,
        heads: Annotated[int, Field(ge=1)] = 2, hidden: Annotated[int, Field(ge=1)] = 64, mask: Mask = "TxT",
        rows: Literal["none", "alone", "batch"] = "none", std: Annotated[float, Field(gt=0)] | None = 0.01,
        dropout: Share = 0.0, attention_dropout: Share = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if in_dim % heads:
            raise UserError(f"model.fusion.heads: model.field_dim {in_dim} is not a multiple of {heads}")
        tokens = num_tasks + num_fields
        self.num_tasks, self.out_dim = num_tasks, in_dim
        self.task_TW = nn.Parameter(torch.randn(num_tasks, in_dim) * (std or 1.0))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(in_dim, heads, hidden, std, dropout, attention_dropout) for _ in range(layers)
        )
        self.rows = rows
        # The code's rotary attention has no dropout.
        across = (attention_dropout, True) if rows == "batch" else (0.0, False)
        row_layers, width = 0 if rows == "none" else layers, tokens * in_dim
        self.row_blocks = nn.ModuleList(Block(width, heads, hidden, std, dropout, *across) for _ in range(row_layers))
        is_task_S = torch.arange(tokens) < num_tasks
        allowed_SS = torch.ones(tokens, tokens, dtype=torch.bool)
        if "FxT" in mask:
            allowed_SS &= is_task_S.unsqueeze(1) | ~is_task_S
        if "TxT" in mask:
            allowed_SS &= ~(is_task_S.unsqueeze(1) & is_task_S) | torch.eye(tokens, dtype=torch.bool)
        self.register_buffer("allowed_SS", allowed_SS, persistent=False)

    def forward(self, x_BFW: Tensor) -> Tensor:
        x_BSW = self._tokens(x_BFW)
        if not self.row_blocks:
            return self.blocks[-1](x_BSW, self.allowed_SS[: self.num_tasks])
        return self._between(self.row_blocks[-1], self.blocks[-1](x_BSW, self.allowed_SS))[:, : self.num_tasks]

    def _tokens(self, x_BFW: Tensor) -> Tensor:
        """What the last block over features reads, x_BSW."""
        x_BSW = self.dropout(torch.cat([self.task_TW.expand(x_BFW.shape[0], -1, -1), x_BFW], 1))
        for index, block in enumerate(self.blocks[:-1]):
            x_BSW = block(x_BSW, self.allowed_SS)
            if self.row_blocks:
                x_BSW = self._between(self.row_blocks[index], x_BSW)
        return x_BSW

    def _between(self, block: nn.Module, x_BSW: Tensor) -> Tensor:
        """A block over rows, x_BSW -> x_BSW: one sequence of B rows, or B sequences of one."""
        row_NPD = x_BSW.flatten(1).unsqueeze(0 if self.rows == "batch" else 1)
        return block(row_NPD).view_as(x_BSW)

    def gates(self, x_BFW: Tensor) -> list[Tensor]:
        """Attention of each task to the features in the last block over features, the mean of the heads: weight_BTF.

        The rest to 1 is on the task's own token, and on other tasks where the mask allows.
        """
        last = self.blocks[-1]
        assert isinstance(last, Block)
        weight_BTS = last.weights(self._tokens(x_BFW), self.allowed_SS[: self.num_tasks])
        return [weight_BTS[:, :, self.num_tasks :]]

    def gate_names(self, tasks: Sequence[str], features: Sequence[str]) -> list[GateNames]:
        """Tasks weigh features."""
        return [GateNames(list(tasks), list(features))]
