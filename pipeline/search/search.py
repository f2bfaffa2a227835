"""An architecture search: a run of training with a supernet, whose result is an architecture (AutoMTL, Algorithm 1)."""

import logging
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Schema
from models.automtl import architecture
from models.automtl.architecture import Architecture, Strengths, derive, random_strengths
from models.ranker import Ranker
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.loader import Loader
from pipeline.run.run import Run
from pipeline.search import page, record
from pipeline.search.config import Budget, SearchConfig
from pipeline.search.cost import budget_of, cost_of, derived_model
from pipeline.search.learner import SearchLearner, encode
from pipeline.search.record import SearchRecord
from pipeline.storage.files import make_folder, write_text
from pipeline.training.architecture_file import FILE
from pipeline.training.loading import loader_of
from pipeline.training.step import StepOutput
from pipeline.training.train import train
from pipeline.training.trainer import Trainer

# Of random search: draws before a budget counts as one that none meets, and what lies between their seeds.
MOST_TRIES, SEED_STRIDE = 10_000, 1_000_003

logger = logging.getLogger(__name__)


def search(config: SearchConfig, schema: Schema | None = None) -> Architecture:
    """Searches to the end, from the newest undamaged checkpoint of the run where it has one; writes its results.

    Args:
        config: all settings. schema: if given, the dataset must have been written for it.
    Raises:
        UserError, Preempted: as `train`.
    """
    if config.search.method == "random":
        return _random(config)
    run = train(config, schema, kind=SearchTrainer)
    return Architecture.model_validate(record.read(run)[-1].architecture)


class SearchTrainer(Trainer):
    """One rank's part of a search. Alpha learns from the valid split, all else from the train split.

    Attributes:
        valid: loader of the valid split, in the same order on any number of ranks. every: steps between evaluations.
        last_loss: step and mean validation loss of the last evaluation, which begins a new mean.
    """

    config: SearchConfig
    learner: SearchLearner
    build_learner = SearchLearner
    last_loss: tuple[int, float | None] = (-1, None)

    def restore(self, schema: Schema, pinned: ExitStack) -> None:
        """As of training. A search that has ended early stays at its end."""
        self.valid = loader_of(self.settings, self.dataset, "valid", self.rank, self.ranks, self.device, alone=False)
        self.space = self.config.space.named(list(self.dataset.schema.tasks))
        self.every = self.config.search.evaluate_every or max(1, self.steps // 20)
        if self.config.search.budget is not None:
            self.learner.budget = budget_of(
                self.config.search.budget, self.config.space, self.learner.ranker, self.config.model, self.dataset,
                *self._example(),
            )  # fmt: skip
        super().restore(schema, pinned)
        self._end_if_unchanged()

    def run_to_end(self) -> Run:
        """Searches to the last step, or until the architecture stays the same; then writes it, and the page."""
        run = super().run_to_end()
        if not record.read(run):  # max_steps was lowered below the first evaluation
            self._evaluate()
        embedding_BE, batch = self._example()
        if self.rank == 0:
            self._write_results(embedding_BE, batch)
        return run

    def train_segment(self) -> None:
        """As of training, with the validation batches of the same steps."""
        with closing(self._valid_batches()) as self.learner.valid:
            super().train_segment()

    def check_losses(self, output: StepOutput) -> None:
        """As of training, after those of alpha's update: one that is not finite spoils those of the train batch."""
        for earlier in self.learner.alpha_outputs:
            self.nonfinite.record_losses(self.state.step + 1, earlier)
        super().check_losses(output)

    def after_step(self) -> bool:
        """As of training, once the architecture was evaluated, if it is due; False also where the search ends early."""
        if self.state.step % self.every == 0 or self.at_end():
            self._evaluate()
            self._end_if_unchanged()
        return super().after_step() and not self.at_end()

    def rollback(self, bad_step: int) -> None:
        """As of training; an early end that lies behind is none any more."""
        self.steps = self.learner.steps
        super().rollback(bad_step)

    def further_figures(self) -> dict[str, Any]:
        """Where the search is."""
        alpha, beta = _entropies(self.learner.strengths(self.state.step))
        evaluated, loss = self.last_loss
        loss = loss if evaluated == self.state.step else self._valid_loss()
        return {
            "search": {
                "valid_loss": loss, "alpha_entropy": alpha, "beta_entropy": beta,
                "diversity_weight": self.learner.diversity_weight(self.state.step),
                "auxiliary": self.learner.supernet.auxiliary,
            }
        }  # fmt: skip

    def _valid_batches(self) -> Generator[Batch]:
        """Those of the steps from the state's on: their number follows from that of the steps alone."""
        start = self.valid.start()
        epoch, done = divmod(self.learner.updates_of_alpha(self.state.step), self.valid.steps(start))
        while True:
            yield from self.valid.batches(self.valid.after(self.valid.start(epoch), done))
            epoch, done = epoch + 1, 0

    def _valid_loss(self) -> float | None:
        loss, count = self.learner.loss_sum_2.tolist()
        return loss / count if count else None

    def _evaluate(self) -> None:
        """Derives the architecture of this step and writes a record of it; all ranks derive the same."""
        strengths = self.learner.strengths(self.state.step)
        if not all(part.isfinite().all() for part in strengths):
            return  # a rollback follows
        found = derive(strengths, self.space, self.learner.budget)
        chosen, learner = encode(found, self.space), self.learner
        # While alpha or beta rests, an architecture stays the same for no reason.
        same = torch.equal(chosen, learner.chosen) and self.state.step > max(learner.warmup, learner.alpha_warmup)
        learner.unchanged.copy_(learner.unchanged + 1 if same else torch.zeros_like(learner.unchanged))
        learner.chosen.copy_(chosen)
        alpha, beta = _entropies(strengths)
        self.last_loss = self.state.step, self._valid_loss()
        line = SearchRecord(
            step=self.state.step, rows=self.state.rows_consumed(self.loader), valid_loss=self.last_loss[1],
            alpha_entropy=alpha, beta_entropy=beta, interaction=strengths.interaction_I.tolist(),
            experts=strengths.expert_NLO.tolist(), tasks=strengths.task_TN.tolist(), unchanged=int(learner.unchanged),
            architecture=found,
        )  # fmt: skip
        learner.loss_sum_2.zero_()
        if self.rank == 0:
            self.run.append(self.run.search_metrics, line.model_dump(mode="json"))
            loss = f"valid loss {line.valid_loss:.4f}  " if line.valid_loss is not None else ""
            self.log(
                f"step {line.step:,}/{self.steps:,}  {loss}entropy alpha {alpha:.3f} beta {beta:.3f}  {found.summary()}"
            )

    def _end_if_unchanged(self) -> None:
        patience = self.config.search.patience
        if patience is not None and int(self.learner.unchanged) >= patience and not self.at_end():
            self.log(f"step {self.state.step:,}: the architecture has not changed for {patience} evaluations: done")
            self.steps = self.state.step

    def _example(self) -> tuple[torch.Tensor, Batch]:
        """A validation batch with its embeddings, to count FLOPs with; all ranks call it."""
        with closing(cast(Any, self.valid.batches(self.valid.start()))) as batches, torch.no_grad():
            batch = next(batches)
            return self.learner.ranker.embedded(batch.to(self.device)), batch

    def _write_results(self, embedding_BE: torch.Tensor, batch: Batch) -> None:
        records = record.read(self.run)
        found = records[-1].architecture
        _write_architecture(self.run.path, found, f"step {records[-1].step:,} of {self.run.path}")
        costs = {
            "found": cost_of(derived_model(self.config.model, found), self.dataset, embedding_BE, batch),
            "supernet": cost_of(self.config.model, self.dataset, embedding_BE, batch),
        }
        facts = [("steps", f"{records[-1].step:,}"), ("train rows", f"{records[-1].rows:,}")]
        facts += [
            (f"{key.replace('_', ' ')}, {name}", f"{cost[key]:,.0f}")
            for key in ("parameters", "flops_per_row")
            for name, cost in costs.items()
        ]
        page.write(
            self.run.path / "search.html", self.run.path.name, records, self.space.interaction, self.space.blocks,
            self.space.tasks, facts,
        )  # fmt: skip


def _random(config: SearchConfig) -> Architecture:
    """An architecture drawn evenly, by the seed of the run: what a search must be better than."""
    dataset = open_dataset(config.dataset, config.days, config.missing_days).only(config.tasks)
    budget = None if config.search.budget is None else _budget_of_draws(config, config.search.budget, dataset)
    seeds = range(config.train.seed, config.train.seed + MOST_TRIES * SEED_STRIDE, SEED_STRIDE)
    draws = (_draw(config, list(dataset.schema.tasks), seed) for seed in seeds)
    found = next((drawn for drawn in draws if budget is None or budget.allows(drawn)), None)
    if found is None:
        raise UserError(
            f"search.budget: none of {MOST_TRIES:,} architectures drawn is within it. Raise it, or lower space.width, "
            "space.experts or space.blocks."
        )
    make_folder(config.run)
    _write_architecture(config.run, found, f"drawn at random, seed {config.train.seed}")
    return found


def _draw(config: SearchConfig, tasks: list[str], seed: int) -> Architecture:
    space = config.space.named(tasks)
    drawn = random_strengths(space, config.space.experts, config.space.depth, seed)
    if config.space.homogeneous:
        same_NLO = drawn.expert_NLO[:1].expand_as(drawn.expert_NLO)
        drawn = Strengths(drawn.interaction_I, same_NLO, drawn.task_TN)
    return derive(drawn, space)


def _budget_of_draws(config: SearchConfig, budget: Budget, dataset: Dataset) -> architecture.Budget:
    """No table is allocated: of the embeddings the shape alone matters, not which row an id has."""
    ranker = Ranker(dataset.schema, dataset.encoders, config.model)
    ranker.managed = None
    loader = Loader(dataset, "train", 16, 1, config.train.seed)
    with closing(cast(Any, loader.batches(loader.start()))) as batches, torch.no_grad():
        batch = next(batches)
        shape = ranker.embedded(batch.to(torch.device("meta"))).shape
    return budget_of(budget, config.space, ranker, config.model, dataset, torch.zeros(shape), batch)


def _write_architecture(folder: Path, found: Architecture, where: str) -> None:
    head = f"# jobs.search: {where}\n# python -m jobs.train model=automtl model.architecture={folder / FILE}\n"
    # Innermost lists and mappings on one line each.
    content = yaml.safe_dump(
        found.model_dump(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
    )
    write_text(folder / FILE, head + content)


def _entropies(strengths: Strengths) -> tuple[float, float]:
    """Mean entropy of alpha and of beta, over that of an even choice."""

    def share(p: torch.Tensor) -> torch.Tensor:
        even = torch.tensor(float(p.shape[-1])).log().clamp(min=1e-30)
        return (-torch.xlogy(p, p).sum(-1) / even).flatten()

    alpha = torch.cat([share(strengths.interaction_I), share(strengths.expert_NLO)]).mean()
    beta = share(strengths.task_TN).mean()
    return float(alpha.detach().clamp(0, 1)), float(beta.detach().clamp(0, 1))
