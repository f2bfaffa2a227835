"""One step's forward: the ranker's logits and their loss over the global batch, whoever holds which rows."""

# Shapes: B rows, T tasks, T1 the tasks and one more.

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from features.batch import Batch
from models.losses import TaskLoss
from models.ranker import Ranker


class StepOutput(NamedTuple):
    """What metrics and checks need of a step's rows on this rank, detached."""

    loss_BT: Tensor
    label_BT: Tensor
    observed_BT: Tensor
    weight_BT: Tensor
    row_id_B: Tensor


class TrainStep(nn.Module):
    """What is wrapped for distribution and differentiated.

    Args:
        ranker: the model. loss: of its tasks. bf16: autocast of the dense part.
    Call Args:
        batch: this rank's rows.
    Returns: the scalar loss, and a StepOutput.
    """

    def __init__(self, ranker: Ranker, loss: TaskLoss, bf16: bool) -> None:
        super().__init__()
        self.ranker, self.loss, self.bf16 = ranker, loss, bf16

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        with torch.autocast(self.loss.weight_T.device.type, torch.bfloat16, enabled=self.bf16):
            logit_BT = self.ranker(batch)
        return global_loss(self.loss, logit_BT, self.ranker.fusion.penalty(logit_BT.float()), batch)


def global_loss(
    loss: TaskLoss, logit_BT: Tensor, penalty_B: Tensor | None, batch: Batch
) -> tuple[Tensor, StepOutput]:  # fmt: skip
    """Mean loss over the observed rows of all ranks; gradients come out right once ranks average them."""
    ranks = dist.get_world_size()
    mass_BT, weight_B = batch.weight_BT * batch.observed_BT, batch.weight_BT[:, 0]
    total_T1 = torch.cat([mass_BT.sum(0), weight_B.sum(0, keepdim=True)])
    if ranks > 1:
        dist.all_reduce(total_T1)
    total_T1 = total_T1 / ranks
    loss_BT = loss.per_row(logit_BT, batch.label_BT)
    output = StepOutput(loss_BT.detach(), batch.label_BT, batch.observed_BT, batch.weight_BT, batch.row_id_B)
    total = loss(loss_BT, mass_BT, total_T1[:-1])
    if penalty_B is not None:
        total = total + (penalty_B * weight_B).sum() / total_T1[-1].clamp(min=torch.finfo(total_T1.dtype).tiny)
    return total, output


torch.fx.wrap("global_loss")  # one node for TorchRec's pipeline, which traces the forward up to the tables
