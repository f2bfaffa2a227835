"""The workload's models in plain PyTorch, as one writes them who knows it well; taskfuse is not imported."""

# Shapes: B rows, F id columns, W width of an embedding, D width of a row, E experts, H hidden, K expert output, T tasks.

import torch
import workload as w
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS = {"mmoe": w.MMOE_EXPERTS, "ple": w.TASKS * w.PLE_OWN + w.PLE_SHARED}
UNSEEN = 2  # ids of a table that stand for missing and unknown values


class Tables(nn.Module):
    """All tables in one, so that a batch needs one lookup and its sparse gradient one update.

    Args:
        rows: of each table.
    Shapes: id_BF -> x_BD, the embeddings side by side.
    """

    first_F: Tensor

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__()
        sizes_F = torch.tensor(rows)
        self.register_buffer("first_F", sizes_F.cumsum(0) - sizes_F)
        self.table = nn.Embedding(sum(rows), w.WIDTH, sparse=True)
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, id_BF: Tensor) -> Tensor:
        return self.table(id_BF + self.first_F).flatten(1)


class Dense(nn.Module):
    """MMoE, or one level of PLE: the first layer of all experts as one product, the others batched over experts or tasks."""

    hidden_TE: Tensor

    def __init__(self, model: str) -> None:
        super().__init__()
        experts, (hidden, out) = EXPERTS[model], w.EXPERT_DIMS
        self.first = nn.Linear(w.IN_DIM, experts * hidden)
        self.second_EHK, self.second_E1K = _layer(experts, hidden, out)
        self.gate = nn.Linear(w.IN_DIM, w.TASKS * experts, bias=False)
        self.tower_TKH, self.tower_T1H = _layer(w.TASKS, out, w.TOWER_DIM)
        self.head_TH1, self.head_T11 = _layer(w.TASKS, w.TOWER_DIM, 1)
        hidden_TE = torch.zeros(w.TASKS, experts, dtype=torch.bool)
        if model == "ple":  # a task does not see the experts of the other tasks
            own = torch.arange(w.TASKS * w.PLE_OWN) // w.PLE_OWN
            hidden_TE[:, : len(own)] = own != torch.arange(w.TASKS)[:, None]
        self.register_buffer("hidden_TE", hidden_TE)

    def forward(self, x_BD: Tensor) -> Tensor:
        experts, hidden, _ = self.second_EHK.shape
        h_EBH = self.first(x_BD).view(-1, experts, hidden).transpose(0, 1).contiguous().relu()  # bmm would copy views
        h_EBK = torch.baddbmm(self.second_E1K, h_EBH, self.second_EHK).relu()
        gate_BTE = self.gate(x_BD).view(-1, w.TASKS, experts).masked_fill(self.hidden_TE, -torch.inf).softmax(-1)
        mix_BTK = torch.bmm(gate_BTE.to(h_EBK.dtype), h_EBK.transpose(0, 1))  # autocast leaves softmax in float32
        tower_TBH = torch.baddbmm(self.tower_T1H, mix_BTK.transpose(0, 1), self.tower_TKH).relu()
        return torch.baddbmm(self.head_T11, tower_TBH, self.head_TH1).squeeze(2).t()


class PlainRanker(nn.Module):
    """Tables, then the dense part, which runs under autocast in bf16.

    Call Args:
        id_BF: of each table. dense_BD, label_BT: float32.
    Returns: the loss, the mean over rows summed over tasks.
    """

    def __init__(self, model: str, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.tables = Tables(tuple(size + UNSEEN for size in w.TABLE_ROWS))
        self.dense = Dense(model)

    def forward(self, id_BF: Tensor, dense_BD: Tensor, label_BT: Tensor) -> Tensor:
        x_BD = torch.cat((self.tables(id_BF), dense_BD), 1)
        return dense_loss(self.dense, x_BD, label_BT, self.bf16)


def dense_loss(dense: Dense, x_BD: Tensor, label_BT: Tensor, bf16: bool) -> Tensor:
    """From the flat input to the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logit_BT = dense(x_BD)
    return F.binary_cross_entropy_with_logits(logit_BT.float(), label_BT, reduction="none").mean(0).sum()


def _layer(stack: int, inner: int, outer: int) -> tuple[nn.Parameter, nn.Parameter]:
    bound = inner**-0.5  # as nn.Linear
    weight = torch.empty(stack, inner, outer).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(torch.empty(stack, 1, outer).uniform_(-bound, bound))
