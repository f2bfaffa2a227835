"""A batch that goes through the dense part in micro-batches: the same gradients, and less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import configuration, task_loss
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from features.batch import Batch
from models.losses import TaskLoss, UncertaintyLoss
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.training.micro_batches import loss_by_micro_batches
from pipeline.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("device")


def first_batch(folder: Path, rows: int) -> Batch:
    loader = Loader(Dataset(folder / "data"), "train", rows, 4, 0)
    return next(loader.batches(loader.start()))


# Conversion is given click, so that its probability over all rows is below click's: only backwards is there a penalty.
AITM = {"name": "aitm", "widths": [8], "chain": ["conversion", "click"], "calibrator": 0.5}
MMOE = {"name": "mmoe", "num_experts": 3, "levels": [[64], [64]]}


def differentiated(folder: Path, fusion: dict[str, Any], learnt: bool, count: int) -> tuple[Tensor, Tensor, dict]:
    """Loss, loss of each row and gradients of a step in `count` micro-batches, on one device in float64."""
    data = Dataset(folder / "data")
    torch.manual_seed(1)
    config = ModelConfig(fusion=fusion, tower=[8], embedding_std=0.1, calibration="monotone")
    ranker = Ranker(data.schema, data.encoders, config, device="cpu").double()
    kinds = [task.kind for task in data.schema.tasks.values()]
    loss = UncertaintyLoss(kinds) if learnt else TaskLoss([1.0, 2.0, 0.5])
    step, batch = TrainStep(ranker, loss.double(), bf16=False, accumulate=count), first_batch(folder, 32)
    total, output = step(Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()})))
    (3 * total).backward()
    return total.detach(), output.loss_BT, {name: p.grad for name, p in step.named_parameters()}


# AITM's penalty is float32, and so are the pooled embeddings.
@pytest.mark.parametrize(("fusion", "learnt", "rtol", "atol"), [(MMOE, True, 1e-10, 1e-14), (AITM, False, 1e-4, 1e-8)])
def test_micro_batches_add_up_to_the_gradients_of_the_whole_whatever_their_number(
    folder: Path, fusion: dict[str, Any], learnt: bool, rtol: float, atol: float
) -> None:
    total, loss_BT, slope = differentiated(folder, fusion, learnt, 1)
    assert len(loss_BT) == 32
    for count in (2, 3, 32, 50):
        in_micro_batches = differentiated(folder, fusion, learnt, count)
        torch.testing.assert_close(in_micro_batches[0], total, rtol=rtol, atol=0)
        torch.testing.assert_close(in_micro_batches[1], loss_BT, rtol=1e-12, atol=1e-14)
        assert in_micro_batches[2].keys() == slope.keys()
        for name, wanted in slope.items():
            bounds = (1e-4, 1e-8) if "embeddings" in name else (rtol, atol)
            torch.testing.assert_close(in_micro_batches[2][name], wanted, rtol=bounds[0], atol=bounds[1])


def test_of_frozen_tables_micro_batches_make_no_gradient_that_would_wake_their_optimiser() -> None:
    embedding_BE, weight = torch.randn(7, 3, requires_grad=True), nn.Parameter(torch.randn(3))
    unused = nn.Parameter(torch.ones(2))

    def run(part_SE: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        loss_S1 = (part_SE.detach() * weight).sum(1, keepdim=True)
        return loss_S1.sum(), loss_S1

    total, _ = loss_by_micro_batches(run, embedding_BE, [weight, unused], 3)
    total.backward()
    assert embedding_BE.grad is None
    assert unused.grad is None
    torch.testing.assert_close(weight.grad, embedding_BE.detach().sum(0))


class Kept:
    """A tensor that autograd keeps for a backward; counts the bytes of those that are alive, and the most there were."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Kept.alive += self.size
        Kept.most = max(Kept.most, Kept.alive)

    def __del__(self) -> None:
        Kept.alive -= self.size


def most_bytes_kept(folder: Path, count: int) -> int:
    data = Dataset(folder / "data")
    config = configuration(folder / "data", folder / "none").model.model_copy(update={"fusion": MMOE})
    ranker = Ranker(data.schema, data.encoders, config, device="cpu")
    step = TrainStep(ranker, task_loss(data.schema), bf16=False, accumulate=count)
    batch = first_batch(folder, 256)
    weights = {p.data_ptr() for p in step.parameters()}
    Kept.alive = Kept.most = 0

    def keep(tensor: Tensor) -> Kept | Tensor:
        return tensor if tensor.data_ptr() in weights else Kept(tensor)

    with saved_tensors_hooks(keep, lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        total, _ = step(batch)
        total.backward()
    return Kept.most


def test_four_micro_batches_keep_a_quarter_of_what_the_whole_batch_keeps_for_its_backward(folder: Path) -> None:
    whole, split = most_bytes_kept(folder, 1), most_bytes_kept(folder, 4)
    assert 0.2 * whole < split < 0.35 * whole
