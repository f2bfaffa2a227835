"""The oracle: metrics of the true probabilities of a generated log, which no model beats but by chance."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict

from features.errors import UserError
from features.schema.schema import Split
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.storage.files import write_json


class Truth(BaseModel):
    """Where the true probabilities of a generated log are.

    Attributes:
        file: Parquet. key: its column that equals row_id. columns: per task, its probability (regression: its mean).
    """

    model_config = ConfigDict(extra="forbid")
    file: Path
    key: str
    columns: dict[str, str]


def path(run: Run, split: Split) -> Path:
    """Where the oracle's metrics are kept."""
    return run.eval_metrics.with_name(f"best-{split}.json")


def write(scorer: Scorer, truth: Truth) -> None:
    """Computes and keeps the oracle's metrics on a scorer's rows. Raises UserError as `metrics`."""
    content = {"dataset": scorer.dataset.name, "metrics": metrics(scorer, truth)}
    write_json(path(scorer.run, scorer.split), content)


def read(run: Run, split: Split, dataset: str) -> dict[str, dict[str, Any]] | None:
    """Task → metric → value, None where no truth is known of this dataset (its name, see Dataset.name)."""
    file = path(run, split)
    known = json.loads(file.read_text()) if file.exists() else {}
    return known["metrics"] if known.get("dataset") == dataset else None


def metrics(scorer: Scorer, truth: Truth) -> dict[str, dict[str, float | int | None]]:
    """Metrics of the true probabilities on a scorer's rows. Raises UserError for a file that cannot be read."""
    try:
        known = pl.read_parquet(truth.file, glob=False, columns=list({truth.key, *truth.columns.values()}))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{truth.file}: cannot be read: {str(error).splitlines()[0]}") from None
    if missing := [task for task, _ in scorer.tasks if task not in truth.columns]:
        raise UserError(
            f"truth.columns: no column for {', '.join(missing)}. Name the one of each task, or leave truth out."
        )
    found = Metrics(scorer.tasks)
    for batch in scorer.loader.batches(scorer.loader.start()):
        rows = pl.DataFrame({truth.key: batch.row_id_B.numpy()})
        rows = rows.join(known, on=truth.key, how="left", maintain_order="left")
        columns = []
        for name, kind in scorer.tasks:
            true_B = torch.from_numpy(rows[truth.columns[name]].fill_null(float("nan")).to_numpy(writable=True))
            columns.append(true_B.double().logit(eps=1e-15) if kind == "binary" else true_B)
        found.update(torch.stack(columns, 1), batch.label_BT, batch.observed_BT, batch.weight_BT)
    return found.compute()
