"""The order of a step's work."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_micro_batches import first_batch
from tiny_training import configuration

from models.losses import TaskLoss
from models.ranker import Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.training.optim.weighting.base import EmbeddingLoss
from pipeline.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("device")


class OfEmbeddings(EmbeddingLoss):
    """Adds nothing to the loss."""

    def from_embeddings(self, *_: object) -> float:
        return 0.0


class Exchange:
    """An all-reduce that is underway: the sums are those of two ranks with the same rows once it is waited for."""

    def __init__(self, order: list[str], sums: torch.Tensor) -> None:
        order.append("begun")
        self.order, self.sums = order, sums

    def wait(self) -> None:
        self.order.append("waited for")
        self.sums *= 2


@pytest.mark.parametrize("kind", ["plain", "micro-batches", "with embeddings"])
def test_the_exchange_of_what_losses_are_divided_by_is_underway_during_the_lookup(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data, order = Dataset(folder / "data"), []
    ranker = Ranker(data.schema, data.encoders, configuration(folder / "data", folder / "none").model, device="cpu")
    loss = (OfEmbeddings if kind == "with embeddings" else TaskLoss)([1.0, 2.0, 0.5])
    loss.shared = []
    step, batch = (
        TrainStep(ranker, loss, bf16=False, accumulate=2 if kind == "micro-batches" else 1),
        first_batch(folder, 32),
    )
    wanted, _ = step(batch)
    embedded = ranker.embedded
    monkeypatch.setattr(ranker, "embedded", lambda batch: order.append("lookup") or embedded(batch))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda sums, async_op: Exchange(order, sums))
    found, _ = step(batch)
    assert order == ["begun", "lookup", "waited for"]
    assert torch.equal(found, wanted)
