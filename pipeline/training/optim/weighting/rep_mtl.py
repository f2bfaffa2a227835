"""Rep-MTL: the tasks' gradients of the shared representation, kept distinct and aligned."""

# Shapes: B rows, T and U tasks, T1 the tasks and one more, E width of all embeddings, G groups of R rows, N = R T.

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from features.batch import PADDING, Batch
from features.errors import UserError
from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import EmbeddingLoss, Weighted, global_mean


class RepMTL(Weighted):
    """As fixed, with two terms on the tasks' gradients of the embeddings (RepMTLLoss).

    When: hard parameter sharing (shared_bottom) whose tasks should share more; about two more passes per task.

    Attributes:
        regulation, alignment: weights of the two terms, lambda_tsr and lambda_csa.
        temperature: of the alignment.
        group: the most rows that are compared with each other.
    """

    name: Literal["rep_mtl"] = "rep_mtl"
    regulation: float = Field(0.9, ge=0, allow_inf_nan=False)
    alignment: float = Field(0.9, ge=0, allow_inf_nan=False)
    temperature: float = Field(0.5, gt=0, allow_inf_nan=False)
    group: int = Field(128, ge=2)
    refuses: ClassVar = {
        "pipelined": "hides the embeddings, by which weighting {name} takes derivatives",
        "accumulate": "splits the rows that weighting {name} compares with each other",
        "dense_parallel": "shards the weights of which weighting {name} takes second derivatives",
        "compile": "has no second derivatives, which weighting {name} takes",
    }

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """RepMTLLoss."""
        return RepMTLLoss(loss_weights, self.regulation, self.alignment, self.temperature, self.group)


class RepMTLLoss(EmbeddingLoss):
    """Rep-MTL (Wang, Li & Xu, ICCV 2025): sum_t w_t L_t + lambda_tsr L_tsr + lambda_csa L_csa (eq. 10).

    Saliencies are S_t = dL_t/dZ, the derivative by the shared representation Z (eq. 3). L_tsr is the mean entropy, over
    places of Z, of the tasks' shares in |S_t|, S_t averaged over channels (eq. 4 to 6). L_csa aligns a row's affinities
    M_t = S_t S_t^T (eq. 7) with the row's anchor A A^T, A the T saliencies averaged over places (eq. 8), against the anchors
    of other rows (eq. 9): -log(exp(cos(anchor_b, M_bt) / tau) / sum_{k != b} exp(cos(anchor_b, anchor_k) / tau)).

    Taken: the equations, and lambda = 0.9, the value that the paper holds one at while it varies the other. Chosen here:
    - Z is the embeddings of a row: one place, of E channels, so that S_t S_t^T is the outer product of a vector.
    - S_t is the derivative of a row's own loss, not of the mean: tasks that few rows observe are not scaled up.
    - A row counts with its weight, as in penalties of a fusion; a task that it does not observe has no share, no part in the
      anchor and no term of its own; L_csa is the mean over a row's tasks. The paper's text gives no tau.
    - Rows are compared within groups of a lane, which belong to the batch and not to the ranks: their number must divide that
      of the groups. A batch that lanes do not fill, the last of an epoch, has no L_csa: where its lanes begin depends on the
      ranks.
    The terms reach everything that S_t depends on, embeddings and towers included.

    Args:
        loss_weights: w_t. regulation, alignment, temperature, group: see RepMTL.
    """

    second_derivatives = True

    def __init__(
        self,
        loss_weights: Sequence[float],
        regulation: float,
        alignment: float,
        temperature: float,
        group: int,
    ) -> None:
        super().__init__(loss_weights)
        self.regulation, self.alignment, self.temperature = regulation, alignment, temperature
        self.most_rows = self.group_rows = group

    def attach(self, shared: Sequence[nn.Parameter], batch_size: int, lanes: int) -> None:  # noqa: ARG002
        """Sets the rows of a group: the most that divide those of a lane. Raises UserError where ranks would cut groups."""
        lane_rows, ranks = batch_size // lanes, dist.get_world_size()
        self.group_rows = max(rows for rows in range(1, self.most_rows + 1) if lane_rows % rows == 0)
        if (groups := batch_size // self.group_rows) % ranks:
            raise UserError(
                f"train.weighting rep_mtl compares the rows of a batch in {groups} groups of {self.group_rows}, which {ranks} "
                f"ranks cannot share: use a number of ranks that divides {groups}"
            )

    def from_embeddings(
        self,
        run: Callable[[Sequence[Tensor]], Tensor],  # noqa: ARG002
        embedding_BE: Tensor,
        loss_BT: Tensor,
        batch: Batch,
        total_T1: Tensor,
    ) -> Tensor:
        """The two terms, times their weights; gradients come out right once ranks average them."""
        weight_BT = batch.weight_BT * batch.observed_BT
        own_BT = loss_BT * (weight_BT > 0)
        saliency = [torch.autograd.grad(own_B.sum(), embedding_BE, create_graph=True)[0] for own_B in own_BT.unbind(1)]
        saliency_BTE = torch.stack(saliency, 1)
        entropy_B = entropies(saliency_BTE.mean(2))
        aligned_B = alignments(saliency_BTE, self.group_rows, self.temperature)
        full = global_mean((batch.row_id_B == PADDING).any().float()) == 0
        weight_B = batch.weight_BT[:, 0] / total_T1[-1].clamp(min=torch.finfo(total_T1.dtype).tiny)
        return (weight_B * (self.regulation * entropy_B + self.alignment * (full * aligned_B))).sum()


def entropies(saliency_BT: Tensor) -> Tensor:
    """entropy_B of the tasks' shares in a row's absolute saliency; 0 for a row without any (eq. 5 and 6)."""
    size_BT = saliency_BT.abs()
    total_B1 = size_BT.sum(1, keepdim=True)
    share_BT = size_BT / total_B1.masked_fill(total_B1 == 0, 1.0)
    return -(share_BT * share_BT.masked_fill(share_BT == 0, 1.0).log()).sum(1)


def alignments(saliency_BTE: Tensor, group_rows: int, temperature: float) -> Tensor:
    """The mean over a row's tasks of the terms of eq. 9: alignment_B, 0 for a row without saliency or without other rows.

    <s s^T, r r^T> = <s, r>^2, so no E x E matrix is made.

    Args:
        group_rows: consecutive rows that are compared with each other, a divisor of B.
    """
    seen_BT = saliency_BTE.detach().abs().sum(2) > 0
    gram_BTU = torch.einsum("bte,bue->btu", saliency_BTE, saliency_BTE).square()
    square_B = gram_BTU.sum((1, 2))
    # The derivative of a norm at 0 is not a number: what is not seen has norm 1 and products of 0.
    norm_B = square_B.masked_fill(square_B == 0, 1.0).sqrt()
    norm_BT = saliency_BTE.square().sum(2).masked_fill(~seen_BT, 1.0)
    positive_BT = gram_BTU.sum(2) / (norm_B.unsqueeze(1) * norm_BT) / temperature
    negative_B, any_B = _negatives(saliency_BTE, norm_B, seen_BT.any(1), group_rows, temperature)
    counted_BT = seen_BT & any_B.unsqueeze(1)
    return ((negative_B.unsqueeze(1) - positive_BT) * counted_BT).sum(1) / counted_BT.sum(1).clamp(min=1)


def _negatives(
    saliency_BTE: Tensor, norm_B: Tensor, seen_B: Tensor, group_rows: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """log_B of the sum over the other rows k of a group of exp(cos(anchor_b, anchor_k) / tau); and whether there is one."""
    tasks = saliency_BTE.shape[1]
    saliency_GNE = saliency_BTE.reshape(-1, group_rows * tasks, saliency_BTE.shape[2])
    product_GNN = torch.bmm(saliency_GNE, saliency_GNE.transpose(1, 2)).square()
    product_GRR = product_GNN.unflatten(2, (group_rows, tasks)).sum(3).unflatten(1, (group_rows, tasks)).sum(2)
    norm_GR, seen_GR = norm_B.view(-1, group_rows), seen_B.view(-1, 1, group_rows)
    cosine_GRR = product_GRR / (norm_GR.unsqueeze(2) * norm_GR.unsqueeze(1))
    other_GRR = seen_GR & ~torch.eye(group_rows, dtype=torch.bool, device=seen_GR.device)
    any_GR1 = other_GRR.any(2, keepdim=True)
    # A row without others is compared with all, so that no infinity enters the derivative; its sum is not used.
    log_GR = (cosine_GRR / temperature).masked_fill(any_GR1 & ~other_GRR, -torch.inf).logsumexp(2)
    return log_GR.flatten(), any_GR1.flatten()
