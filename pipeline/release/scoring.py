"""All figures of a checkpoint over all rows of the day, whatever split their time falls into."""

# Shapes: B rows, T tasks, K buckets.

from functools import partial, reduce
from pathlib import Path

import numpy as np
import polars as pl
from torch import Tensor, from_numpy

from features.batch import PADDING, Batch
from features.errors import UserError
from features.hashing import hash_integers
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.evaluated import ALL, COLUMNS, Evaluated, Provenance
from pipeline.evaluation.metrics.intervals import standard_error
from pipeline.evaluation.scorer import Scorer
from pipeline.release.encoded_day import rows_id
from pipeline.release.night import Figure, ModelReference
from pipeline.run import checkpoint
from pipeline.run.headline import HEADLINE
from pipeline.run.run import Run

BUCKETS = 20


def score(model: ModelReference, day: Dataset, batch_size: int) -> Evaluated:
    """Scores a checkpoint. Two models on the same rows can be paired, whatever their encoders are.

    Raises:
        UserError: the checkpoint is damaged, or another one by now.
    """
    run, parts = Run(Path(model.run)), []
    for split in (split for split, rows in day.manifest.rows.items() if rows):
        scorer = Scorer(run, day, split, batch_size)
        buckets = [Metrics(scorer.tasks) for _ in range(BUCKETS)]
        found = scorer.metrics(model.step, partial(_add, buckets))[1]
        if found.checksum != model.checkpoint:
            raise UserError(f"{model}: its checkpoint was replaced while it was judged. Run the same command again.")
        parts.append(buckets)
    whole = [reduce(Metrics.merge, of_bucket) for of_bucket in zip(*parts, strict=True)]
    return Evaluated(_figures(whole), _provenance(model, day))


def _add(buckets: list[Metrics], batch: Batch, logit_BT: Tensor) -> None:
    """Adds each row to the metrics of its bucket."""
    bucket_B = from_numpy((hash_integers(batch.row_id_B.numpy()) % BUCKETS).astype(np.int64))
    for number, metrics in enumerate(buckets):
        ours_B = (bucket_B == number) & (batch.row_id_B != PADDING)
        metrics.update(logit_BT[ours_B], batch.label_BT[ours_B], batch.observed_BT[ours_B], batch.weight_BT[ours_B])


def figures_of(evaluated: Evaluated) -> dict[str, Figure]:
    """Each task's headline metric."""
    lines = evaluated.figures.filter(pl.col("slice") == ALL, pl.col("metric").is_in([*HEADLINE.values()]))
    return {
        line["task"]: Figure(metric=line["metric"], value=line["value"], se=line["se"], rows=line["rows"])
        for line in lines.iter_rows(named=True)
    }


def reference(run: Run, step: int | None) -> ModelReference:
    """A run's checkpoint (None: the newest) by its checksum. Raises UserError where there is none."""
    found = checkpoint.steps(run.checkpoints)
    if not found or (step is not None and step not in found):
        of_step = f" of step {step}" if step is not None else ""
        raise UserError(f"{run.checkpoints}: no checkpoint{of_step}, there are {found or 'none'}")
    step = found[-1] if step is None else step
    manifest = checkpoint.read(checkpoint.folder(run.checkpoints, step))
    return ModelReference(run=str(run.path.absolute()), step=step, checkpoint=manifest.checksum)


def _provenance(model: ModelReference, day: Dataset) -> Provenance:
    """The raw day identifies the rows here, not the encoded one: models of other encoders are scored on the same rows."""
    return Provenance(
        run=model.run, step=model.step, checkpoint=model.checkpoint, dataset=rows_id(day), split=ALL, buckets=BUCKETS
    )


def _figures(buckets: list[Metrics]) -> pl.DataFrame:
    """Figures of all rows with their values without each bucket, from the metrics of each bucket alone."""
    whole = reduce(Metrics.merge, buckets).compute()
    without_K = [reduce(Metrics.merge, [*buckets[:k], *buckets[k + 1 :]]).compute() for k in range(len(buckets))]
    has_K = [metrics.compute() for metrics in buckets]
    lines = []
    for task, metrics in whole.items():
        for name, value in metrics.items():
            left_out = [w[task][name] if h[task]["rows"] else None for w, h in zip(without_K, has_K, strict=True)]
            se = float(standard_error(np.array(left_out, np.float64)))
            lines.append(
                {
                    "task": task, "metric": name, "dimension": ALL, "slice": ALL, "rows": metrics["rows"],
                    "value": value, "se": None if np.isnan(se) else se, "left_out": left_out,
                }
            )  # fmt: skip
    return pl.DataFrame(lines, schema=COLUMNS)
