"""A checkpoint's scores on a split: metrics, predictions and expert weights."""

# Shapes: B rows, T tasks.

import time
from collections.abc import Callable
from typing import Any

import polars as pl
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Split
from models.emm import build_ranker
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
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
        self.run, self.split = run, split
        self.dataset = dataset = dataset.only(run.config().get("tasks"))
        self.schema = run.schema()
        dataset.check_compatible(self.schema.fingerprint, f"the run {run.path}")
        self.tasks = [(name, task.kind) for name, task in self.schema.tasks.items()]
        self.loader = Loader(dataset, split, batch_size)
        model = ModelConfig.of_run(run.config(), run.path)
        self.ranker = build_ranker(self.schema, dataset.encoders, model, device="cpu").eval()

    @torch.inference_mode()
    def metrics(
        self, step: int, on_batch: Callable[[Batch, Tensor], None] | None = None
    ) -> tuple[Metrics, checkpoint.CheckpointManifest]:
        """A checkpoint's metrics on the split, and its manifest.

        Args:
            on_batch: called with every batch and its logit_BT.
        Raises:
            UserError: a checkpoint that is not complete, or that was trained on rows of other encoders.
        """
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
        }

    def provenance(self, checksum: str) -> dict[str, str]:
        """Of which checkpoint and dataset a file of predictions is."""
        return {"checkpoint": checksum, "dataset": self.dataset.name}
