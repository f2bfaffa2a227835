"""MultiTab-Net: feature tokens, task tokens and a mask between them (arXiv 2511.09970)."""

# Shapes: B rows, T tasks, F features, W width of a token, S = T + F tokens (the tasks first), Q tokens with a query, H heads,
# V = W / H.

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from features.errors import UserError
from models.fusion.fusion import Fusion

Mask = Literal["none", "FxT", "TxT", "FxT_TxT"]


class Block(nn.Module):
    """One pre-norm transformer block that updates the first Q tokens, attending to all.

    Args:
        dim: W. heads: share W evenly. hidden: width of the feed-forward layer. dropout: at the end of both branches.
    Call Args:
        x_BSW: tokens. allowed_QS: bool, the attention mask.
    Returns: x_BQW.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.forward_norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSW: Tensor, allowed_QS: Tensor) -> Tensor:
        q_BHQV, k_BHSV, v_BHSV = self._project(x_BSW, allowed_QS.shape[0])
        h_BHQV = nn.functional.scaled_dot_product_attention(q_BHQV, k_BHSV, v_BHSV, attn_mask=allowed_QS)
        x_BQW = x_BSW[:, : allowed_QS.shape[0]] + self.dropout(self.out(h_BHQV.transpose(1, 2).flatten(2)))
        return x_BQW + self.dropout(self.down(torch.relu(self.up(self.forward_norm(x_BQW)))))

    def weights(self, x_BSW: Tensor, allowed_QS: Tensor) -> Tensor:
        """Attention weights, the mean of the heads: weight_BQS."""
        q_BHQV, k_BHSV, _ = self._project(x_BSW, allowed_QS.shape[0])
        score_BHQS = q_BHQV @ k_BHSV.transpose(2, 3) / q_BHQV.shape[3] ** 0.5
        return score_BHQS.masked_fill(~allowed_QS, -torch.inf).softmax(3).mean(1)

    def _project(self, x_BSW: Tensor, queries: int) -> tuple[Tensor, ...]:
        """Queries of the first tokens, keys and values of all, each head with its part of the width."""
        y_BSW = self.norm(x_BSW)
        k_BSW, v_BSW = self.key_value(y_BSW).chunk(2, 2)
        parts = (self.query(y_BSW[:, :queries]), k_BSW, v_BSW)
        return tuple(part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)


class MultiTab(Fusion):
    """A transformer over the features of a row and one learnt token a task; a mask keeps tasks apart.

    From the paper's public text (abstract, the authors' settings): a token a feature, a learnt token a task, all attending
    to all but for the mask, with its variants: "FxT": features do not attend to tasks, "TxT": a task does not attend to
    other tasks (they still meet in features that attend to them), "FxT_TxT": neither, "none": no mask. The settings for all
    real data are TxT, one block, 4 heads, tokens of 8 or 16, 256 hidden. A task's last token feeds its tower.

    Chosen here: no attention between the rows of a batch, which the paper has beside that between features, since a
    row's score would depend on its neighbours; two blocks instead, for with one no feature would attend to another.
    Blocks normalise first and use ReLU. No positions: each feature's token comes from a layer of its own. The
    last block updates the tasks' tokens only, since the others are not read.

    Args:
        in_dim: W. num_tasks: T. num_fields: F.
        layers: blocks. heads: must divide W. hidden: width of their feed-forward layer. mask: see above.
        dropout: at the end of a block's branches.
    Shapes: x_BFW -> h_BTW.
    Raises:
        UserError: heads that do not divide W.
    """

    fields = True
    allowed_SS: Tensor

    def __init__(
        self, in_dim: int, num_tasks: int, num_fields: int, layers: Annotated[int, Field(ge=1)] = 2,
        heads: Annotated[int, Field(ge=1)] = 2, hidden: Annotated[int, Field(ge=1)] = 64, mask: Mask = "TxT",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if in_dim % heads:
            raise UserError(f"model.fusion.heads: model.field_dim {in_dim} is not a multiple of {heads}")
        self.num_tasks, self.out_dim = num_tasks, in_dim
        self.task_TW = nn.Parameter(torch.randn(num_tasks, in_dim))
        self.blocks = nn.ModuleList(Block(in_dim, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(in_dim)
        is_task_S = torch.arange(num_tasks + num_fields) < num_tasks
        allowed_SS = torch.ones(len(is_task_S), len(is_task_S), dtype=torch.bool)
        if "FxT" in mask:
            allowed_SS &= is_task_S.unsqueeze(1) | ~is_task_S
        if "TxT" in mask:
            allowed_SS &= ~(is_task_S.unsqueeze(1) & is_task_S) | torch.eye(len(is_task_S), dtype=torch.bool)
        self.register_buffer("allowed_SS", allowed_SS, persistent=False)

    def forward(self, x_BFW: Tensor) -> Tensor:
        return self.norm(self.blocks[-1](self._tokens(x_BFW), self.allowed_SS[: self.num_tasks]))

    def _tokens(self, x_BFW: Tensor) -> Tensor:
        """What the last block reads, x_BSW."""
        x_BSW = torch.cat([self.task_TW.expand(x_BFW.shape[0], -1, -1), x_BFW], 1)
        for block in self.blocks[:-1]:
            x_BSW = block(x_BSW, self.allowed_SS)
        return x_BSW

    def gates(self, x_BFW: Tensor) -> list[Tensor]:
        """Attention of each task to the features in the last block, the mean of the heads: weight_BTF.

        The rest to 1 is on the task's own token, and on other tasks where the mask allows.
        """
        last = self.blocks[-1]
        assert isinstance(last, Block)
        weight_BTS = last.weights(self._tokens(x_BFW), self.allowed_SS[: self.num_tasks])
        return [weight_BTS[:, :, self.num_tasks :]]
