"""One step's forward: the ranker's outputs and their loss over the global batch, however ranks share its rows."""

# Shapes: B rows, T tasks, T1 the tasks and one more, E width of all embeddings, K numbers a task.

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from features.batch import Batch
from models.losses import TaskLoss
from models.ranker import Ranker, is_table
from pipeline.training.micro_batches import loss_by_micro_batches
from pipeline.training.optim.weighting.base import EmbeddingLoss


class StepOutput(NamedTuple):
    """What metrics and checks need of a step's rows on this rank, detached."""

    loss_BT: Tensor
    label_BT: Tensor
    observed_BT: Tensor
    weight_BT: Tensor
    row_id_B: Tensor


class LossesOfRows(NamedTuple):
    """Losses per row and task to learn from, the part of them that metrics are made of, and the fusion's penalty, if any."""

    loss_BT: Tensor
    shown_BT: Tensor
    penalty_B: Tensor | None


class TrainStep(nn.Module):
    """What is wrapped for distribution and differentiated.

    Args:
        ranker: the model. loss: of its tasks. bf16: autocast of the dense part.
        accumulate: micro-batches that go through the dense part one after the other. Random draws that the rows of a rank
            share (dropout, autotask's blocks) are shared by the rows of a micro-batch.
    Attributes:
        rows: the dense part and the losses of its rows: `row_losses`, or the same compiled (pipeline.training.compiled).
    Call Args:
        batch: this rank's rows.
    Returns: the scalar loss, and a StepOutput.
    """

    def __init__(self, ranker: Ranker, loss: TaskLoss, bf16: bool, accumulate: int = 1) -> None:
        super().__init__()
        self.ranker, self.loss, self.bf16, self.accumulate = ranker, loss, bf16, accumulate
        self.rows: Callable[[Tensor, Batch], LossesOfRows] = self.row_losses

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        if self.accumulate > 1:
            return self._by_micro_batches(batch)
        if isinstance(self.loss, EmbeddingLoss):
            return self._with_embeddings(batch, self.loss)
        divisors = begin_weight_sums(self.ranker, batch)  # its exchange overlaps with the lookup and the dense part
        return loss_after_lookup(self, self.ranker.embedded(batch), batch, divisors)

    def row_losses(self, embedding_BE: Tensor, batch: Batch) -> LossesOfRows:
        """All that lies between the lookup and sums over rows; of `batch` everything but `sparse`."""
        with torch.autocast(self.loss.weight_T.device.type, torch.bfloat16, enabled=self.bf16):
            out_KBT = self.ranker.dense_outputs(embedding_BE, batch)
        return _of_rows(self.ranker, out_KBT, batch)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Those that are trained outside of the tables."""
        parts = [part for name, part in self.ranker.named_children() if not is_table(name)]
        return [p for part in (*parts, self.loss) for p in part.parameters() if p.requires_grad]

    def _with_embeddings(self, batch: Batch, loss: EmbeddingLoss) -> tuple[Tensor, StepOutput]:
        """A step whose loss sees the embeddings, and runs the dense part again."""
        batch = self.ranker.row_losses.training_batch(batch)
        divisors = global_weight_sums(batch)
        embedding_BE = self.ranker.embedded(batch)
        total_T1 = divisors()
        shared: Sequence[nn.Parameter] = loss.shared
        names = {id(parameter): f"ranker.{name}" for name, parameter in self.ranker.named_parameters()}

        def run(values: Sequence[Tensor]) -> Tensor:
            replaced = {names[id(p)]: value for p, value in zip(shared, values, strict=True)}
            torch.manual_seed(torch.initial_seed())  # the draws of the forward, before which the learner seeds
            with torch.autocast(loss.weight_T.device.type, torch.bfloat16, enabled=self.bf16):
                arguments = (embedding_BE.detach(), batch)
                out_KBT = functional_call(DensePart(self.ranker), replaced, arguments, tie_weights=False)
            return self.ranker.row_losses(out_KBT, batch.label_BT, batch.observed_BT)[0]

        def reduce(loss_BT: Tensor, observed_weight_BT: Tensor, total_T: Tensor) -> Tensor:
            total = loss(loss_BT, observed_weight_BT, total_T)
            return total + loss.from_embeddings(run, embedding_BE, loss_BT, batch, total_T1)

        attention = sdpa_kernel(SDPBackend.MATH) if loss.second_derivatives else nullcontext()
        with torch.autocast(loss.weight_T.device.type, torch.bfloat16, enabled=self.bf16), attention:
            out_KBT = self.ranker.dense_outputs(embedding_BE, batch)
        total, loss_BT = _loss(reduce, _of_rows(self.ranker, out_KBT, batch), batch, total_T1)
        return total, _output(loss_BT.detach(), batch)

    def _by_micro_batches(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        batch = self.ranker.row_losses.training_batch(batch)
        divisors = global_weight_sums(batch)
        embedding_BE = self.ranker.embedded(batch)
        total_T1 = divisors()

        def run(embedding_BE: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            some = rows_of(batch, rows)
            return _loss(self.loss.of_rows, self.rows(embedding_BE, some), some, total_T1)

        total, loss_BT = loss_by_micro_batches(run, embedding_BE, self.dense_parameters(), self.accumulate)
        return total + self.loss.regulariser(total_T1[:-1]), _output(loss_BT, batch)


class DensePart(nn.Module):
    """The ranker from its embeddings on, as a module that functional_call can call."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, embedding_BE: Tensor, batch: Batch) -> Tensor:
        return self.ranker.dense_outputs(embedding_BE, batch)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, for the dense part: `sparse` stays that of all rows."""
    return replace(
        batch,
        dense_BD=batch.dense_BD[rows],
        label_BT=batch.label_BT[rows],
        observed_BT=batch.observed_BT[rows],
        weight_BT=batch.weight_BT[rows],
        row_id_B=batch.row_id_B[rows],
    )


def global_weight_sums(batch: Batch) -> Callable[[], Tensor]:
    """Begins to add up what losses are divided by, so that an average over ranks is the mean over the global batch.

    Returns: a function that waits for total_T1: for each task the weight of observed rows, then the weight of all rows; of the
        global batch, over the number of ranks.
    """
    observed_weight_BT, weight_B = batch.weight_BT * batch.observed_BT, batch.weight_BT[:, 0]
    total_T1 = torch.cat([observed_weight_BT.sum(0), weight_B.sum(0, keepdim=True)])
    ranks = dist.get_world_size()
    underway = dist.all_reduce(total_T1, async_op=True) if ranks > 1 else None

    def divisors() -> Tensor:
        if underway is not None:
            underway.wait()
        return total_T1 / ranks

    return divisors


def begin_weight_sums(ranker: Ranker, batch: Batch) -> Callable[[], Tensor]:
    """`global_weight_sums` of the labels and rows that are learnt from."""
    return global_weight_sums(ranker.row_losses.training_batch(batch))


def loss_after_lookup(
    step: TrainStep, embedding_BE: Tensor, batch: Batch, divisors: Callable[[], Tensor]
) -> tuple[Tensor, StepOutput]:
    """The rest of a step once the tables are read: its loss over the observed rows of all ranks.

    Args:
        divisors: from `begin_weight_sums`.
    """
    batch = step.ranker.row_losses.training_batch(batch)
    total, loss_BT = _loss(step.loss, step.rows(embedding_BE, batch), batch, divisors())
    return total, _output(loss_BT.detach(), batch)


# One node each for TorchRec's pipeline, which traces the forward up to the tables.
torch.fx.wrap("begin_weight_sums")
torch.fx.wrap("loss_after_lookup")


def global_loss(
    loss: TaskLoss, ranker: Ranker, out_KBT: Tensor, batch: Batch, divisors: Callable[[], Tensor]
) -> tuple[Tensor, StepOutput]:
    """Mean loss over the observed rows of all ranks; gradients come out right once ranks average them.

    Args:
        divisors: from `begin_weight_sums`.
    """
    batch = ranker.row_losses.training_batch(batch)
    total, loss_BT = _loss(loss, _of_rows(ranker, out_KBT, batch), batch, divisors())
    return total, _output(loss_BT.detach(), batch)


def _of_rows(ranker: Ranker, out_KBT: Tensor, batch: Batch) -> LossesOfRows:
    loss_BT, shown_BT = ranker.row_losses(out_KBT, batch.label_BT, batch.observed_BT)
    return LossesOfRows(loss_BT, shown_BT, ranker.fusion.penalty(out_KBT[0].float()))


def _loss(
    reduce: Callable[[Tensor, Tensor, Tensor], Tensor], rows: LossesOfRows, batch: Batch, total_T1: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of a batch's rows, reduced to a scalar, and loss_BT as metrics take it."""
    total = reduce(rows.loss_BT, batch.weight_BT * batch.observed_BT, total_T1[:-1])
    if (penalty_B := rows.penalty_B) is not None:
        weight_B = batch.weight_BT[:, 0]
        total = total + (penalty_B * weight_B).sum() / total_T1[-1].clamp(min=torch.finfo(total_T1.dtype).tiny)
    return total, rows.shown_BT


def _output(loss_BT: Tensor, batch: Batch) -> StepOutput:
    return StepOutput(loss_BT, batch.label_BT, batch.observed_BT, batch.weight_BT, batch.row_id_B)
