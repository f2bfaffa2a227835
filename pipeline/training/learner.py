"""The learner: a model placed on the ranks, its loss and optimisers, and a step in three parts: forward, backward, update."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from features.batch import Batch
from models.ranker import is_table
from pipeline.dataset.dataset import Dataset
from pipeline.run import checkpoint
from pipeline.torch_compat import norms
from pipeline.training.compiled import compiled
from pipeline.training.config import TrainConfig
from pipeline.training.device_copies import copied_ahead
from pipeline.training.optim import weighting
from pipeline.training.optim.dense import build, rate, table_rate
from pipeline.training.optim.tables import replicated_tables
from pipeline.training.optim.weighting.base import AdaptiveLoss, shared_parameters
from pipeline.training.parallel import cache, replicas, shard
from pipeline.training.parallel.row_load import RowLoad
from pipeline.training.parallel.row_reset import ManagedRows
from pipeline.training.state_names import in_ranker
from pipeline.training.step import StepOutput, TrainStep


class Learner:
    """One rank's part of a model in training: forward, backward and update of a step, called in this order.

    Its tables mean nothing before `init_tables` or `load`.

    Args:
        config: all settings. dataset: whose schema and encoders the model is built from.
        rank: of this process. device: of the model.
        steps: of the whole run, over which learning rates fall. epoch_steps: of an epoch.
    Attributes:
        model: the step, sharded and replicated. ranker: the model inside. loss: of its tasks.
        dense: the optimiser of all but the tables.
    Raises:
        UserError: a model, a plan or an optimiser that is not possible.
    """

    prefetch = False  # of rows of tables in main memory (fused_uvm_caching)

    def __init__(
        self, config: TrainConfig, dataset: Dataset, rank: int, device: torch.device, steps: int, epoch_steps: int
    ) -> None:
        self.settings = s = config.train
        self.rank, self.device, self.steps, self.epoch_steps = rank, device, steps, epoch_steps
        torch.manual_seed(s.seed)  # the dense start is the same on every rank
        self.ranker = ranker = shard.unplaced(dataset.schema, dataset.encoders, config.model, s)
        if config.model.start == "base_rate":
            ranker.start_at(dataset.base_rates())
        self.loss = weighting.task_loss(s.weighting, dataset.schema.tasks, s.seed)
        step = TrainStep(ranker, self.loss, s.precision == "bf16", s.accumulate)
        if s.compile:
            step.rows = compiled(step, s.compile)
        load = RowLoad.of_training(dataset, config.model, s.precision == "bf16") if rank == 0 else RowLoad()
        self.model = shard.shard(step, ranker, s, device, load, self.prefetch)
        self.embedding_std = config.model.embedding_std
        dense = [(n, p) for n, p in self.model.named_parameters() if not is_table(in_ranker(n)) and p.requires_grad]
        self.dense = build(s.dense, dense, s.clip_norm)
        self.replicas = replicated_tables(self.model, s.tables)
        self.optimizer = CombinedOptimizer([self.dense, self.replicas])  # those of sharded tables are in their backward
        self.adaptive = self.loss if isinstance(self.loss, AdaptiveLoss) else None
        if self.adaptive:
            order = s.order()
            self.adaptive.attach(shared_parameters(ranker, dense), order.batch_size, order.lanes)
        self.managed = ManagedRows(ranker, Learner.state(self))
        self.step = 0  # of the update to come, from 0

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint that are the same on any number of ranks, as views: loading fills them in place."""
        replicas.synchronise(self.model)
        return {
            "model": {in_ranker(name): value for name, value in self.model.state_dict().items()},
            "tables": self.model.fused_optimizer.state_dict()["state"] | self.replicas.state_dict()["state"],
            "dense": self.dense.state_dict()["state"],
        }

    def init_tables(self) -> None:
        """Draws the tables' start."""
        shard.init_tables(self.ranker, self.ranker.tables, self.settings.seed, self.embedding_std)

    def load(self, path: Path, updates: int) -> None:
        """Loads the state of a checkpoint.

        Args:
            updates: that its optimisers had made.
        """
        checkpoint.load(path, self.state())
        shard.set_step(self.model, updates)

    def feed(self, batches: Iterator[Batch], count: int) -> Iterator[Batch | None]:  # noqa: ARG002
        """What `forward` is called with, once a step: the batches on the model's device.

        Args:
            batches: `count` of them, on the CPU; in page-locked memory where the model is on a GPU.
        """
        if self.device.type == "cpu":
            return batches
        return copied_ahead(batches, self.device, torch.cuda.Stream(self.device))

    def forward(self, batch: Batch | None, step: int) -> StepOutput:
        """Losses of a batch, before anything is updated.

        Args:
            step: taken before, which learning rate and random state are functions of.
        """
        assert batch is not None
        self.prepare(step)
        self.optimizer.zero_grad()
        self.total, output = self.model(batch)
        return output

    def backward(self) -> Tensor:
        """Gradients of the forward's loss, which update the sharded tables; returns the largest norm of a dense gradient."""
        self.total.backward()
        return self._largest_gradient()

    def update(self) -> None:
        """Updates what is not sharded."""
        if self.adaptive:
            self.adaptive.after_backward(self.step)
        self.optimizer.step()
        self._finish()

    def _largest_gradient(self) -> Tensor:
        """The largest norm of this rank's dense gradients; not finite if one of them is not."""
        grads = [p.grad for p in self.dense.params.values() if p.grad is not None]
        found = norms([g.to_local() if isinstance(g, DTensor) else g for g in grads])
        return torch.stack(list(found)).max() if found else torch.zeros((), device=self.device)

    def prepare(self, step: int) -> None:
        """Learning rate and random state, both functions of the step's number."""
        self.step = step
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * 4099 + self.rank)
        for group in self.dense.param_groups:
            group["lr"] = rate(self.settings.dense, step, self.steps)
        table_lr = table_rate(self.settings.tables, step, self.steps, self.epoch_steps)
        if table_lr != self.replicas.lr:
            self.replicas.lr = table_lr
            shard.set_table_rate(self.model, table_lr)
        if self.adaptive:
            self.adaptive.before_step()

    def _finish(self) -> None:
        if self.adaptive:
            self.adaptive.after_update()
        self.managed.after_step(self.step + 1)
        replicas.after_step(self.model, self.step + 1, self.settings.sync_every)


class PipelinedLearner(Learner):
    """The same on TorchRec's pipeline, which overlaps the next batches' copies and exchanges with a step on a GPU.

    Its forward is a whole step, so losses and gradients are checked after the update. Where a table is in main memory
    (fused_uvm_caching), the next batch's rows are fetched during a step as well.
    """

    prefetch = True

    def feed(self, batches: Iterator[Batch], count: int) -> Iterator[None]:
        """The pipeline takes batches ahead of the step that they are for."""
        self.batches = batches
        kind = TrainPipelineSparseDist
        if cache.is_cached(self.model.plan):
            kind = PrefetchTrainPipelineSparseDist
            shard.forget_prefetched(self.model)
        self.pipeline = kind(self.model, self.optimizer, self.device, execute_all_batches=True)
        return repeat(None, count)

    def forward(self, batch: Batch | None, step: int) -> StepOutput:  # noqa: ARG002
        """A step on the next batch, backward and update included."""
        self.prepare(step)
        return self.pipeline.progress(self.batches)

    def backward(self) -> Tensor:
        """The largest norm of a dense gradient."""
        return self._largest_gradient()

    def update(self) -> None:
        """What follows the optimisers' update."""
        self._finish()


def build_learner(
    config: TrainConfig, dataset: Dataset, rank: int, device: torch.device, steps: int, epoch_steps: int
) -> Learner:
    """A learner; pipelined where there is a GPU to overlap with, or where `train.pipelined` says so. See Learner."""
    managed = any(table.managed for table in dataset.schema.all_tables.values())
    kind = PipelinedLearner if config.train.is_pipelined(device.type, managed) else Learner
    return kind(config, dataset, rank, device, steps, epoch_steps)
