"""A checkpoint's scores on a split: metrics, predictions and expert weights."""

# Shapes: B rows, T tasks.

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import SPLITS, Split
from models.ranker import Ranker
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation import predictions
from pipeline.evaluation.expert_weights import ExpertWeights
from pipeline.evaluation.lockstep import gathered, to_first
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.evaluation.metrics.row_keys import SplitKeys
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.weights import Loading, ModelWeights
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.store_path import place


class Scorer:
    """A run's model on one split of a dataset.

    Args:
        run: whose checkpoints. dataset: must have the run's schema. split: of it, or all of them.
        batch_size: rows at a time, on each rank. measure: slices, clusters and groups. loading: how the tables are loaded.
    Raises:
        UserError: no run, or a dataset of another schema.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        split: Split | Literal["all"],
        batch_size: int,
        measure: MeasureConfig | None = None,
        loading: Loading | None = None,
    ) -> None:
        self.run, self.split = run, split
        self.dataset = dataset = dataset.only(run.config().get("tasks"))
        self.schema = run.schema()
        dataset.check_compatible(self.schema.fingerprint, f"the run {run.path}")
        self.tasks = [(name, task.kind) for name, task in self.schema.tasks.items()]
        self.measure = measure or MeasureConfig()
        splits: list[Split] = [s for s in SPLITS if dataset.manifest.rows.get(s)] if split == "all" else [split]
        self.keys = SplitKeys(self.measure, dataset, splits, train_rates(run))
        self.weights = ModelWeights(run, dataset, splits, batch_size, loading)
        self.splits, self.batch_size = splits, batch_size

    @property
    def ranker(self) -> Ranker:
        """The model, without the weights of a checkpoint until one has been scored."""
        return self.weights.ranker

    @torch.inference_mode()
    def metrics(
        self, step: int, on_batch: Callable[[Batch, Tensor], None] | None = None
    ) -> tuple[Metrics, checkpoint.CheckpointManifest]:
        """A checkpoint's metrics on the split, and its manifest.

        Where ranks share the rows all of them call it: rank 0 then has the metrics of all rows, others those of their own.

        Args:
            on_batch: called with every batch of this rank and its logit_BT.
        Raises:
            UserError: a checkpoint that is not complete, of another model than config.yaml has, or trained on rows of other
                encoders.
        """
        manifest = self.weights.load(step)
        metrics = Metrics(self.tasks, self.keys.grouping, self.keys.names)

        def update() -> None:
            with ThreadPoolExecutor(1) as thread:  # adds up a batch while the model scores the next one
                added: Future[None] | None = None
                for reader in self._readers(self.weights.rank, self.weights.ranks):
                    batches = self.weights.in_step(reader.batches(), reader.empty)
                    for batch, logit_BT in self.weights.scored(batches):
                        if added:
                            added.result()
                        counted = (batch.label_BT, batch.observed_BT, batch.weight_BT, batch.key_BC)
                        added = thread.submit(metrics.update, logit_BT, *counted)
                        if on_batch:
                            on_batch(batch, logit_BT)
                if added:
                    added.result()

        if self.weights.ranks == 1 or self.weights.sharded:
            update()
        else:  # each rank goes through its rows by itself: one that fails must not leave the others waiting for it
            gathered(update)
        return self._merged(metrics), manifest

    def _merged(self, metrics: Metrics) -> Metrics:
        """On rank 0 the metrics of all ranks' rows; on others their own."""
        if self.weights.ranks == 1:
            return metrics
        if (states := to_first(metrics.state())) is None:
            return metrics
        whole = Metrics(self.tasks, self.keys.grouping, self.keys.names)
        for state in states:
            part = Metrics(self.tasks, self.keys.grouping, self.keys.names)
            part.load(state)
            whole = whole.merge(part)
        return whole

    def _readers(self, rank: int = 0, ranks: int = 1) -> list[SplitReader]:
        return [SplitReader(self.dataset, s, self.batch_size, rank, ranks, keys=self.keys) for s in self.splits]

    def batches(self) -> Iterator[Batch]:
        """All rows that are scored, in the order of the dataset, whatever ranks there are."""
        for reader in self._readers():
            yield from reader.batches()

    def score(self, step: int) -> Evaluated:
        """All figures of a checkpoint, none of it written. Raises UserError as `metrics`."""
        metrics, manifest = self.metrics(step)
        return Evaluated(metrics.frame(metrics.figures()), self.provenance_of(step, manifest.checksum))

    def evaluate(self, step: int, write_predictions: bool = False) -> dict[str, Any]:
        """One checkpoint's record for eval.jsonl (see pipeline.run.records); its figures of all slices are written to a file.

        Where ranks share the rows all of them call it; rank 0 writes, and the others have no record.

        Args:
            write_predictions: write each row's prediction (pipeline.evaluation.predictions).
        Raises:
            UserError: as `metrics`.
        """
        begin = time.perf_counter()
        frames: list[pl.DataFrame] = []

        def on_batch(batch: Batch, logit_BT: Tensor) -> None:
            weights.update(batch)
            if write_predictions:
                frames.append(predictions.frame(batch, logit_BT, self.schema))

        self.weights.check_fits(step)
        with ExpertWeights(self.ranker.fusion) as weights:
            metrics, manifest = self.metrics(step, on_batch)
        gates = weights.means_of_ranks() if self.weights.ranks > 1 else weights.means()
        if self.weights.ranks > 1 and write_predictions:
            frames = [frame for part in to_first(frames) or [] for frame in part]
        if self.weights.rank:
            return {}
        figures = metrics.figures()
        provenance = self.provenance_of(step, manifest.checksum)
        file = evaluated.path(self.run, provenance, self.own_dataset)
        evaluated.write(Evaluated(metrics.frame(figures), provenance), file)
        if write_predictions:
            rows = predictions.with_kept(pl.concat(frames), self.dataset, self.splits)
            predictions.write(rows, predictions.path(self.run, self.split, step), self.provenance(manifest.checksum))
        names = self.ranker.fusion.gate_names(list(self.schema.tasks), self.ranker.fields)
        seconds = time.perf_counter() - begin
        return {
            "step": step,
            "checkpoint": manifest.checksum,
            "rows": manifest.rows,
            "split": self.split,
            "dataset": self.dataset.name,
            "share": self.measure.share,
            "cluster": self.keys.cluster,
            "group": self.keys.group,
            "buckets": self.measure.buckets,
            "measure": self.measured,
            "time": time.time(),
            "seconds": seconds,
            "ranks": self.weights.ranks,
            "rows_evaluated": metrics.rows,
            "rows_per_s": metrics.rows / seconds,
            **metrics.record(figures),
            "evaluation": file.name,
            "gates": gates,
            "gate_names": [{"units": level.units, "experts": level.experts} for level in names],
        }

    @cached_property
    def own_dataset(self) -> bool:
        """See `is_own_dataset`."""
        return is_own_dataset(self.run, self.dataset)

    @property
    def measured(self) -> str:
        """Identifies the settings that the figures depend on: what is measured, the tables' format, and how little
        of the rows is kept."""
        precision = self.weights.loading.precision
        halved = f"-{1 << self.keys.halvings}" if self.keys.halvings else ""
        return self.measure.hash + ("" if precision == "fp32" else f"-{precision}") + halved

    def provenance_of(self, step: int, checksum: str) -> Provenance:
        """Of which checkpoint and rows an evaluation is."""
        return Provenance(
            run=str(self.run.path),
            step=step,
            checkpoint=checksum,
            dataset=self.dataset.name,
            split=self.split,
            share=self.measure.share,
            share_by=self.keys.share_by if self.measure.share < 1 else "",
            cluster=self.keys.cluster,
            buckets=self.measure.buckets,
            kept=0.5**self.keys.halvings,
            measure=self.measured,
            min_rows=self.measure.min_rows,
        )

    def provenance(self, checksum: str) -> dict[str, str]:
        """Of which checkpoint and dataset a file of predictions is."""
        return {"checkpoint": checksum, "dataset": self.dataset.name}


def is_own_dataset(run: Run, dataset: Dataset) -> bool:
    """Whether rows are of the dataset, and of all the days of it, that a run trains on."""
    trained = run.config()
    if dataset.path != place(trained["dataset"]).absolute() or not trained.get("days"):
        return dataset.name == str(place(trained["dataset"]).absolute())
    try:
        return dataset.name == _trained_on(trained).name
    except UserError:  # of the days that it trained on some are gone: these are others
        return False


def train_rates(run: Run) -> dict[str, float]:
    """Base rates of the train split that a run was trained on; none where that dataset is gone."""
    content = run.config()
    try:
        return _trained_on(content).only(content.get("tasks")).base_rates()
    except UserError:
        return {}


def _trained_on(content: dict[str, Any]) -> Dataset:
    return open_dataset(
        place(content["dataset"]).absolute(), content.get("days"), content.get("missing_days", "refuse")
    )
