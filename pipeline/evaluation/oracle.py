"""What no model can beat but by luck: the metrics of the true probabilities of a generated log."""

from pathlib import Path

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict

from features.errors import UserError
from features.schema.schema import Split
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.scorer import Evaluator
from pipeline.run.run import Run


class Truth(BaseModel):
    """Where the true probabilities of a generated log are.

    Attributes:
        file: Parquet. key: its column that equals row_id. columns: per task, its probability (regression: its mean).
    """

    model_config = ConfigDict(extra="forbid")
    file: Path
    key: str
    columns: dict[str, str]


def best_path(run: Run, split: Split) -> Path:
    """Where the metrics of the true probabilities are kept."""
    return run.eval_metrics.with_name(f"best-{split}.json")


def best(evaluator: Evaluator, truth: Truth) -> dict[str, dict[str, float | int | None]]:
    """Metrics of the true probabilities on the same rows: what no model can beat but by luck. Raises UserError."""
    try:
        known = pl.read_parquet(truth.file, columns=list({truth.key, *truth.columns.values()}))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{truth.file}: cannot be read: {str(error).splitlines()[0]}") from None
    metrics = Metrics(evaluator.tasks)
    for batch in evaluator.loader.batches(evaluator.loader.start()):
        rows = pl.DataFrame({truth.key: batch.row_id_B.numpy()}).join(
            known, on=truth.key, how="left", maintain_order="left"
        )
        columns = [
            torch.from_numpy(rows[truth.columns[name]].fill_null(float("nan")).to_numpy(writable=True))
            for name, _ in evaluator.tasks
        ]
        logit_BT = torch.stack(
            [
                c.double().logit(eps=1e-15) if kind == "binary" else c
                for c, (_, kind) in zip(columns, evaluator.tasks, strict=True)
            ],
            1,
        )
        metrics.update(logit_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
    return metrics.compute()
