"""All figures of a checkpoint over all rows of the day, whatever split their time falls into."""

import time
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.evaluated import ALL, Evaluated, with_intervals
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.metrics.slice_names import COLD_START
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.weights import Loading
from pipeline.release.encoded_day import rows_id
from pipeline.release.night import Figure, ModelReference
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.headline import HEADLINE
from pipeline.run.run import Run
from pipeline.storage.store_path import place


@dataclass(frozen=True)
class Counted:
    """The rows of a day as a model predicts them; on ranks but the first only their own."""

    scorer: Scorer
    metrics: Metrics
    manifest: CheckpointManifest


def score(
    model: ModelReference, day: Dataset, batch_size: int, measure: MeasureConfig, loading: Loading | None = None
) -> tuple[Evaluated, dict[str, Any]]:
    """Scores a checkpoint. Returns its figures, and its record as for eval.jsonl. Raises UserError as `counted`."""
    return results(counted(model, day, batch_size, measure, loading), day)


def counted(
    model: ModelReference, day: Dataset, batch_size: int, measure: MeasureConfig, loading: Loading | None = None
) -> Counted:
    """Runs a checkpoint over the rows; where ranks share them all call it.

    Raises:
        UserError: the checkpoint is damaged, or another one by now.
    """
    scorer = Scorer(Run(place(model.run)), day, "all", batch_size, measure, loading)
    metrics, manifest = scorer.metrics(model.step)
    if manifest.checksum != model.checkpoint:
        raise UserError(f"{model}: its checkpoint was replaced while it was judged. Run the same command again.")
    return Counted(scorer, metrics, manifest)


def results(found: Counted, day: Dataset) -> tuple[Evaluated, dict[str, Any]]:
    """The figures, and the record as for eval.jsonl.

    The raw rows identify the dataset of the figures, not the encoded ones: models of other encoders are paired on them.
    """
    metrics, manifest = found.metrics, found.manifest
    figures, provenance = metrics.figures(), found.scorer.provenance_of(manifest.step, manifest.checksum)
    record = {
        **{"step": manifest.step, "checkpoint": manifest.checksum, "rows": manifest.rows, "time": time.time()},
        **{"split": provenance.split, "dataset": provenance.dataset, "share": provenance.share},
        **{"cluster": provenance.cluster, "group": found.scorer.keys.group, "buckets": provenance.buckets},
        **metrics.record(figures),
    }
    return Evaluated(metrics.frame(figures), provenance.model_copy(update={"dataset": rows_id(day)})), record


def comparable(theirs: Evaluated) -> Evaluated:
    """Figures to compare with those of a model of other encoders: without slices of ids that training has not seen.

    These are other rows for each encoders.
    """
    return replace(theirs, figures=theirs.figures.filter(~pl.col("dimension").str.ends_with(COLD_START)))


def figures_of(evaluated: Evaluated) -> dict[str, Figure]:
    """Each task's headline metric."""
    lines = evaluated.figures.filter(pl.col("slice") == ALL, pl.col("metric").is_in([*HEADLINE.values()]))
    columns = ("metric", "value", "se", "low", "high", "rows")
    found = with_intervals(lines).iter_rows(named=True)
    return {line["task"]: Figure(**{name: line[name] for name in columns}) for line in found}


def reference(run: Run, step: int | None) -> ModelReference:
    """A run's checkpoint (None: the newest) by its checksum. Raises UserError where there is none."""
    found = checkpoint.steps(run.checkpoints)
    if not found or (step is not None and step not in found):
        of_step = f" of step {step}" if step is not None else ""
        raise UserError(f"{run.checkpoints}: no checkpoint{of_step}, there are {found or 'none'}")
    step = found[-1] if step is None else step
    manifest = checkpoint.read(checkpoint.folder(run.checkpoints, step))
    return ModelReference(run=str(run.path.absolute()), step=step, checkpoint=manifest.checksum)
