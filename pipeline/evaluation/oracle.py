"""The oracle: metrics of the true probabilities of a generated log, which no model beats but by chance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict

from features.errors import UserError, one_line
from features.parquet_limits import check_file
from features.plain_json import parse_json, validated
from features.regular_files import read_regular
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.report.results import is_complete
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.storage.files import whole, write_json
from pipeline.storage.store_path import Place

MAX_BYTES = 1 << 20  # of the oracle's metrics


class Truth(BaseModel):
    """Where the true probabilities of a generated log are.

    Attributes:
        file: Parquet. key: its column that equals row_id. columns: per task, its probability (regression: its mean).
    """

    model_config = ConfigDict(extra="forbid")
    file: Place
    key: str
    columns: dict[str, str]


def path(run: Run, split: str) -> Path:
    """Where the oracle's metrics are kept."""
    return run.eval_metrics.with_name(f"best-{split}.json")


def write(scorer: Scorer, truth: Truth) -> None:
    """Computes and keeps the oracle's metrics on a scorer's rows. Raises UserError as `metrics`."""
    content = {"dataset": scorer.dataset.name, "share": scorer.measure.share, "metrics": metrics(scorer, truth)}
    write_json(path(scorer.run, scorer.split), content)


def read(
    run: Run, split: str, dataset: str, kinds: Mapping[str, str], share: float = 1.0
) -> dict[str, dict[str, Any]] | None:
    """Task → metric → value, None where no truth is known of this dataset (its name, see Dataset.name).

    Args:
        kinds: of the tasks. share: of the split that was scored: other rows have another best.
    Raises:
        UserError: the file is damaged, or of other tasks.
    """
    file = path(run, split)
    try:
        content = parse_json(read_regular(file.parent, file.name, MAX_BYTES), file, strict=False)
    except FileNotFoundError:
        return None
    known = validated(_OracleFile, content, file)
    if (known.dataset, known.share) != (dataset, share):
        return None
    if not is_complete(known.metrics, kinds):
        raise UserError(f"{file}: lacks a metric of {', '.join(kinds)}. Remove it: jobs.evaluate writes it anew.")
    return known.metrics


class _OracleFile(BaseModel):
    dataset: str
    share: float = 1.0
    metrics: dict[str, dict[str, int | float | None]]


def metrics(scorer: Scorer, truth: Truth) -> dict[str, dict[str, float | int | None]]:
    """Metrics of the true probabilities on a scorer's rows. Raises UserError for a file that cannot be read."""
    names = [*dict.fromkeys([truth.key, *truth.columns.values()])]
    try:
        check_file(truth.file, names)
        known = pl.read_parquet(whole(truth.file), glob=False, columns=names)
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise UserError(f"{truth.file}: cannot be read: {one_line(error)}") from None
    if missing := [task for task, _ in scorer.tasks if task not in truth.columns]:
        raise UserError(
            f"truth.columns: no column for {', '.join(missing)}. Name the one of each task, or leave truth out."
        )
    found = Metrics(scorer.tasks)
    for batch in scorer.batches():
        rows = pl.DataFrame({truth.key: batch.row_id_B.numpy()})
        rows = rows.join(known, on=truth.key, how="left", maintain_order="left")
        columns = []
        for name, kind in scorer.tasks:
            true_B = torch.from_numpy(rows[truth.columns[name]].fill_null(float("nan")).to_numpy(writable=True))
            columns.append(true_B.double().logit(eps=1e-15) if kind == "binary" else true_B)
        found.update(torch.stack(columns, 1), batch.label_BT, batch.observed_BT, batch.weight_BT)
    return found.compute()
