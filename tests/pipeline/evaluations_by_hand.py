"""Checkpoints without tensors, and records and files of figures that nobody computed: for tests of who evaluates what."""

import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.run import Run

ABOUT = {"cursors": [1], "window": 1, "batch_size": 1, "data": "d", "fingerprint": "f", "encoders": "e", "config": "c"}
DATASET = "/data"
MEASURE = MeasureConfig()


def commit(run: Run, step: int, weights: int = 0, epoch: int = 0) -> str:
    """A checkpoint of other `weights` in place of the step's; returns its checksum."""
    path = checkpoint.folder(run.checkpoints, step)
    manifest = CheckpointManifest(step=step, rows=step, seed=weights, epoch=epoch, **ABOUT).sealed({})
    staging = path.with_name(f".{path.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / "manifest.json").write_text(manifest.model_dump_json())
    if path.exists():
        checkpoint.remove(path, wait=True)
    staging.rename(path)
    return manifest.checksum


def record(step: int, checksum: str, **more: Any) -> dict[str, Any]:
    """A line of eval.jsonl, measured with MEASURE."""
    metrics = {"click": {"ne": 0.9, "auc": 0.6}}
    about = {"step": step, "checkpoint": checksum, "split": "test", "dataset": DATASET, "rows": step}
    return about | {"share": 1.0, "measure": MEASURE.hash, "cluster": "user", "buckets": 2, "metrics": metrics} | more


def write_figures(run: Run, about: dict[str, Any]) -> Path:
    """The file of figures of a record."""
    provenance = Provenance(
        run=str(run.path), step=about["step"], checkpoint=about["checkpoint"], dataset=about["dataset"],
        split=about["split"], share=about.get("share", 1.0), cluster="user", buckets=about.get("buckets", 2),
        measure=about["measure"],
    )  # fmt: skip
    line = {"task": "click", "metric": "ne", "dimension": "all", "slice": "all", "rows": 1, "value": 0.9, "se": 0.1}
    file = evaluated.path(run, provenance, about["dataset"] == DATASET)
    evaluated.write(Evaluated(pl.DataFrame([line | {"left_out": [0.9, 0.8]}], evaluated.COLUMNS), provenance), file)
    return file


def set_commit_time(run: Run, step: int, seconds: float) -> None:
    os.utime(checkpoint.folder(run.checkpoints, step) / "manifest.json", (seconds, seconds))
