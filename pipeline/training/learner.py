"""What learns: the model, placed on the ranks, with its loss and its optimisers, and what a step does to them."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from features.batch import Batch
from models.emm import build_ranker
from models.ranker import is_table
from pipeline.dataset.dataset import Dataset
from pipeline.run import checkpoint
from pipeline.torch_compat import norms
from pipeline.training.config import TrainConfig
from pipeline.training.optim import weighting
from pipeline.training.optim.dense import build, rate
from pipeline.training.optim.tables import replicated_tables
from pipeline.training.parallel import replicas, shard
from pipeline.training.parallel.row_reset import ManagedRows
from pipeline.training.parallel.state_names import in_ranker
from pipeline.training.step import StepOutput, TrainStep

Look = Callable[[StepOutput], None]


class Learner:
    """One rank's part of a model in training.

    Args:
        config: all settings. dataset: whose schema and encoders the model is built from.
        rank: of this process. device: of the model.
        steps: of the whole run, over which the learning rate falls.
    Attributes:
        model: the step, sharded and replicated. ranker: the model inside. loss: of its tasks.
        dense: the optimiser of all but the tables.
    Raises:
        UserError: a model, a plan or an optimiser that cannot be.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, rank: int, device: torch.device, steps: int) -> None:
        self.settings = s = config.train
        self.rank, self.device, self.steps = rank, device, steps
        torch.manual_seed(s.seed)  # the dense start is the same on every rank
        self.ranker = ranker = build_ranker(dataset.schema, dataset.encoders, config.model)
        self.loss = weighting.task_loss(s, dataset.schema.tasks)
        step = TrainStep(ranker, self.loss, s.precision == "bf16", s.accumulate)
        self.model = shard.shard(step, ranker, s, device)
        shard.init_tables(ranker, ranker.tables, s.seed, config.model.embedding_std)
        dense = [(n, p) for n, p in self.model.named_parameters() if not is_table(in_ranker(n)) and p.requires_grad]
        self.dense = build(s.dense, dense, s.clip_norm)
        self.replicas = replicated_tables(self.model, s.tables)
        self.optimizer = CombinedOptimizer([self.dense, self.replicas])  # those of sharded tables are in their backward
        self.gradient_loss = self.loss if isinstance(self.loss, weighting.GradientLoss) else None
        if self.gradient_loss:
            self.gradient_loss.shared = weighting.shared_parameters(ranker, dense)
        self.managed = ManagedRows(ranker, self.state())

    def state(self) -> dict[str, Any]:
        """The tensors of a checkpoint that are the same on any number of ranks, as views: loading fills them in place."""
        replicas.synchronise(self.model)
        return {
            "model": {in_ranker(name): value for name, value in self.model.state_dict().items()},
            "tables": self.model.fused_optimizer.state_dict()["state"] | self.replicas.state_dict()["state"],
            "dense": self.dense.state_dict()["state"],
        }

    def load(self, path: Path, updates: int) -> None:
        """Takes the state of a checkpoint.

        Args:
            updates: that its optimisers had made.
        """
        checkpoint.load(path, self.state())
        shard.set_step(self.model, updates)

    def outputs(
        self, batches: Iterator[Batch], step: int, look: Look, feel: Callable[[int, Tensor], None]
    ) -> Iterator[StepOutput]:
        """Takes a step a batch: TorchRec's pipeline where there is a GPU to overlap with, a plain loop elsewhere.

        Args:
            step: taken so far.
            look: sees what a step has found, in the plain loop before anything is updated.
            feel: gets the step and the largest norm of a dense gradient, in the plain loop before the dense part is updated.
        """
        s = self.settings
        possible = not self.gradient_loss and s.accumulate == 1 and self.ranker.managed is None
        if s.pipelined if s.pipelined is not None else self.device.type == "cuda" and possible:
            yield from self._pipelined(batches, step, look, feel)
            return
        for number, batch in zip(count(step), batches, strict=False):
            self._prepare(number)
            self.optimizer.zero_grad()
            loss, output = self.model(batch.to(self.device) if self.device.type != "cpu" else batch)
            look(output)
            loss.backward()
            feel(number + 1, self._largest_gradient())
            if self.gradient_loss:
                self.gradient_loss.after_backward(number)
            self.optimizer.step()
            self._finish(number)
            yield output

    def _pipelined(
        self, batches: Iterator[Batch], step: int, look: Look, feel: Callable[[int, Tensor], None]
    ) -> Iterator[StepOutput]:
        pipeline = TrainPipelineSparseDist(self.model, self.optimizer, self.device, execute_all_batches=True)
        for number in count(step):
            self._prepare(number)
            try:
                output = pipeline.progress(batches)
            except StopIteration:
                return
            look(output)
            feel(number + 1, self._largest_gradient())
            self._finish(number)
            yield output

    def _largest_gradient(self) -> Tensor:
        """The largest norm of this rank's dense gradients; not finite if one of them is not."""
        grads = [p.grad for p in self.dense.params.values() if p.grad is not None]
        found = norms([g.to_local() if isinstance(g, DTensor) else g for g in grads])
        return torch.stack(list(found)).max() if found else torch.zeros((), device=self.device)

    def _prepare(self, step: int) -> None:
        """Learning rate and random state of the step after `step`, both functions of its number."""
        torch.manual_seed((self.settings.seed * 1_000_003 + step) * 4099 + self.rank)
        for group in self.dense.param_groups:
            group["lr"] = rate(self.settings.dense, step, self.steps)

    def _finish(self, step: int) -> None:
        self.managed.after_step(step + 1)
        replicas.after_step(self.model, step + 1, self.settings.sync_every)
