"""A checkpoint's scores on a split: metrics, predictions and expert weights."""

# Shapes: B rows, T tasks.

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError, one_line
from features.fit.encoders import Encoders
from features.schema.schema import SPLITS, Schema, Split
from models.emm import build_ranker
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation import predictions
from pipeline.evaluation.expert_weights import ExpertWeights
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.accumulator import Metrics, errors_of, values_of
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.evaluation.metrics.row_keys import SplitKeys
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.run import checkpoint
from pipeline.run.run import Run


class Scorer:
    """A run's model on one split of a dataset: one process, on the CPU, tables not sharded.

    Args:
        run: whose checkpoints. dataset: must have the run's schema. split: of it, or all of them. batch_size: rows at a time.
        measure: slices, clusters and groups.
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
    ) -> None:
        self.run, self.split, self.fits = run, split, False
        self.dataset = dataset = dataset.only(run.config().get("tasks"))
        self.schema = run.schema()
        dataset.check_compatible(self.schema.fingerprint, f"the run {run.path}")
        self.tasks = [(name, task.kind) for name, task in self.schema.tasks.items()]
        self.measure = measure or MeasureConfig()
        splits: list[Split] = [s for s in SPLITS if dataset.manifest.rows.get(s)] if split == "all" else [split]
        self.keys = SplitKeys(self.measure, dataset, splits, train_rates(run))
        self.readers = [SplitReader(dataset, each, batch_size, keys=self.keys) for each in splits]
        self.model = ModelConfig.of_run(run.config(), run.path)

    @cached_property
    def ranker(self) -> Ranker:
        """The model, without the weights of a checkpoint until one has been scored."""
        return build_ranker(self.schema, self.dataset.encoders, self.model, device="cpu").eval()

    def check_fits(self, step: int) -> None:
        """Compares the model with the first checkpoint that is scored, before it takes any memory. Raises UserError."""
        if not self.fits:
            check_fits(checkpoint.folder(self.run.checkpoints, step), self.schema, self.dataset.encoders, self.model)
            self.fits = True

    @torch.inference_mode()
    def metrics(
        self, step: int, on_batch: Callable[[Batch, Tensor], None] | None = None
    ) -> tuple[Metrics, checkpoint.CheckpointManifest]:
        """A checkpoint's metrics on the split, and its manifest.

        Args:
            on_batch: called with every batch and its logit_BT.
        Raises:
            UserError: a checkpoint that is not complete, of another model than config.yaml has, or trained on rows of other
                encoders.
        """
        self.check_fits(step)
        path = checkpoint.folder(self.run.checkpoints, step)
        with checkpoint.reading(path) as manifest:
            if manifest.encoders != self.dataset.encoders_id:
                raise UserError(
                    f"{self.dataset.path} was encoded with {self.dataset.encoders_id}, {path} trained with "
                    f"{manifest.encoders}: its ids mean something else. Run jobs.preprocess with encoders.from=DATASET, the "
                    "one it was trained on."
                )
            checkpoint.load(path, {"model": self.ranker.state_dict()}, alone=True)
        metrics = Metrics(self.tasks, self.keys.grouping, self.keys.names)
        for batch in self.batches():
            logit_BT = self.ranker(batch)
            metrics.update(logit_BT, batch.label_BT, batch.observed_BT, batch.weight_BT, batch.key_BC)
            if on_batch:
                on_batch(batch, logit_BT)
        return metrics, manifest

    def batches(self) -> Iterator[Batch]:
        """The rows that are scored, in the order of the dataset."""
        for reader in self.readers:
            yield from reader.batches()

    def score(self, step: int) -> Evaluated:
        """All figures of a checkpoint, none of it written. Raises UserError as `metrics`."""
        metrics, manifest = self.metrics(step)
        return Evaluated(metrics.frame(metrics.figures()), self.provenance_of(step, manifest.checksum))

    def evaluate(self, step: int, write_predictions: bool = False) -> dict[str, Any]:
        """One checkpoint's record for eval.jsonl (see pipeline.run.records); its figures of all slices are written to a file.

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

        self.check_fits(step)
        with ExpertWeights(self.ranker.fusion) as weights:
            metrics, manifest = self.metrics(step, on_batch)
        figures = metrics.figures()
        provenance = self.provenance_of(step, manifest.checksum)
        file = evaluated.path(self.run, provenance, self.own_dataset)
        evaluated.write(Evaluated(metrics.frame(figures), provenance), file)
        if write_predictions:
            predictions.write(frames, predictions.path(self.run, self.split, step), self.provenance(manifest.checksum))
        seconds = time.perf_counter() - begin
        return {
            "step": step,
            "checkpoint": manifest.checksum,
            "rows": manifest.rows,
            "split": self.split,
            "dataset": self.dataset.name,
            "share": self.measure.share,
            "cluster": self.keys.cluster,
            "buckets": self.measure.buckets,
            "time": time.time(),
            "seconds": seconds,
            "rows_evaluated": metrics.rows,
            "rows_per_s": metrics.rows / seconds,
            "metrics": values_of(figures),
            "intervals": errors_of(figures),
            "reliability": metrics.reliability(),
            "ranking": metrics.ranking(),
            "evaluation": file.name,
            "gates": weights.means(),
            "gate_names": [
                level._asdict() for level in self.ranker.fusion.gate_names(list(self.schema.tasks), self.ranker.fields)
            ],
        }

    @cached_property
    def own_dataset(self) -> bool:
        """Whether the rows are of the dataset that the run trains on."""
        return self.dataset.path == Path(self.run.config()["dataset"]).absolute()

    def provenance_of(self, step: int, checksum: str) -> Provenance:
        """Of which checkpoint and rows an evaluation is."""
        return Provenance(
            run=str(self.run.path),
            step=step,
            checkpoint=checksum,
            dataset=self.dataset.name,
            split=self.split,
            share=self.measure.share,
            cluster=self.keys.cluster,
            buckets=self.measure.buckets,
        )

    def provenance(self, checksum: str) -> dict[str, str]:
        """Of which checkpoint and dataset a file of predictions is."""
        return {"checkpoint": checksum, "dataset": self.dataset.name}


def train_rates(run: Run) -> dict[str, float]:
    """Base rates of the train split that a run was trained on; none where that dataset is gone."""
    content = run.config()
    try:
        dataset = open_dataset(Path(content["dataset"]), content.get("days"), content.get("missing_days", "refuse"))
    except UserError:
        return {}
    return dataset.only(content.get("tasks")).base_rates()


def check_fits(path: Path, schema: Schema, encoders: Encoders, model: ModelConfig) -> None:
    """Compares the shapes of a model with those of a checkpoint, before any memory is allocated.

    A run's config.yaml may be untrusted: the checkpoint's files limit what the model may take.

    Raises:
        UserError: no model can be built of the settings, or one of another shape.
    """
    try:
        with torch.device("meta"):
            wanted = build_ranker(schema, encoders, model).state_dict()
    except UserError as error:
        raise UserError(f"{path.parents[1] / 'config.yaml'}: {error}") from None
    except (RuntimeError, TypeError, ValueError, LookupError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{path.parents[1] / 'config.yaml'}: model cannot be built: {one_line(error)}") from None
    found = checkpoint.shapes(path)
    for name, tensor in wanted.items():
        if (shape := found.get(f"model.{name}")) != tuple(tensor.size()):
            has = "does not have it" if shape is None else f"has {list(shape)}"
            raise UserError(
                f"{path.parents[1] / 'config.yaml'}: its model has {name} of shape {list(tensor.size())}, the checkpoint "
                f"{path.name} {has}. They are not of one run: restore both."
            )
