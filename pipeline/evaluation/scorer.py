"""A checkpoint's scores on a split: metrics, predictions and expert weights."""

# Shapes: B rows, T tasks.

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError, one_line
from features.fit.encoders import Encoders
from features.schema.schema import Schema, Split
from models.emm import build_ranker
from models.ranker import ModelConfig, Ranker
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.dataset.shards import table_sizes
from pipeline.evaluation import predictions
from pipeline.evaluation.expert_weights import ExpertWeights
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.run import checkpoint
from pipeline.run.run import Run


class Scorer:
    """A run's model on one split of a dataset: one process, on the CPU, tables not sharded.

    Args:
        run: whose checkpoints. dataset: must have the run's schema. split: of it. batch_size: rows at a time.
    Raises:
        UserError: no run, or a dataset of another schema.
    """

    def __init__(self, run: Run, dataset: Dataset, split: Split, batch_size: int) -> None:
        self.run, self.split, self.fits = run, split, False
        self.dataset = dataset = dataset.only(run.config().get("tasks"))
        self.schema = run.schema()
        dataset.check_compatible(self.schema.fingerprint, f"the run {run.path}")
        self.tasks = [(name, task.kind) for name, task in self.schema.tasks.items()]
        self.loader = Loader(dataset, split, batch_size, table_sizes=table_sizes(dataset))
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
        metrics = Metrics(self.tasks)
        for batch in self.loader.batches(self.loader.start()):
            logit_BT = self.ranker(batch)
            metrics.update(logit_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
            if on_batch:
                on_batch(batch, logit_BT)
        return metrics, manifest

    def evaluate(self, step: int, write_predictions: bool = False) -> dict[str, Any]:
        """One checkpoint's record for eval.jsonl (see pipeline.run.records), with rows (seen in training), time, seconds and
        mean gate weights.

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
        if write_predictions:
            predictions.write(frames, predictions.path(self.run, self.split, step), self.provenance(manifest.checksum))
        return {
            "step": step,
            "checkpoint": manifest.checksum,
            "rows": manifest.rows,
            "split": self.split,
            "dataset": self.dataset.name,
            "time": time.time(),
            "seconds": time.perf_counter() - begin,
            "metrics": metrics.compute(),
            "gates": weights.means(),
            "gate_names": [
                level._asdict() for level in self.ranker.fusion.gate_names(list(self.schema.tasks), self.ranker.fields)
            ],
        }

    def provenance(self, checksum: str) -> dict[str, str]:
        """Of which checkpoint and dataset a file of predictions is."""
        return {"checkpoint": checksum, "dataset": self.dataset.name}


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
