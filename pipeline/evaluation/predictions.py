"""A checkpoint's prediction of each row of a split, as a Parquet file."""

# Shapes: B rows, T tasks.

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError, one_line
from features.parquet_limits import check_file
from features.parquet_schema import check_nesting_of
from features.regular_files import lstat_regular
from features.schema.schema import Schema
from pipeline.run.run import Run
from pipeline.storage.files import make_folder
from pipeline.storage.local import replacing


def path(run: Run, split: str, step: int) -> Path:
    """Where the predictions of a checkpoint are kept."""
    return run.path / "predictions" / f"{split}-{step:08d}.parquet"


def frame(batch: Batch, logit_BT: Tensor, schema: Schema) -> pl.DataFrame:
    """row_id, weight, and per task logit.TASK (regression: the prediction) and label.TASK (null: not observed)."""
    real_B = batch.row_id_B >= 0
    label_BT = torch.where(batch.observed_BT, batch.label_BT, torch.nan)
    columns = {"row_id": batch.row_id_B, "weight": batch.weight_BT[:, 0]}
    for t, task in enumerate(schema.tasks):
        columns |= {f"logit.{task}": logit_BT[:, t].float(), f"label.{task}": label_BT[:, t]}
    return pl.DataFrame({name: column[real_B].numpy() for name, column in columns.items()}).fill_nan(None)


def write(frames: list[pl.DataFrame], file: Path, provenance: dict[str, str] | None = None) -> None:
    """Writes the rows atomically; `provenance` is kept in the file's metadata, see `is_from`."""
    make_folder(file.parent)
    with replacing(file) as temporary:
        pl.concat(frames).sort("row_id").write_parquet(temporary, metadata=provenance)


def is_from(file: Path, provenance: dict[str, str]) -> bool:
    """Whether a file exists and was written with this provenance. Raises UserError for a link, or columns nested too deep."""
    try:
        if lstat_regular(file.parent, file.name) is None:
            return False
        check_nesting_of(file)
        found = pl.read_parquet_metadata(file)
    except (OSError, pl.exceptions.PolarsError):
        return False  # damaged: it is written again
    return provenance.items() <= found.items()


def read(file: Path, hint: str = "Remove it: jobs.evaluate writes it again.") -> pl.DataFrame:
    """Rows that `write` wrote. Raises UserError, which ends in `hint`, for a file that cannot be read; also for a link, or one
    that unpacks to too much.
    """
    try:
        if lstat_regular(file.parent, file.name) is not None:
            check_file(file)
        return pl.read_parquet(file, glob=False)
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}). {hint}") from None


def row_losses(rows: pl.DataFrame, task: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each row in float64, in nats (regression: squared error), and its weight, which is 0 where not observed."""
    z_B, y_B = (rows[f"{column}.{task}"].to_numpy().astype(np.float64) for column in ("logit", "label"))
    weight_B = np.where(np.isnan(y_B), 0.0, rows["weight"].to_numpy().astype(np.float64))
    loss = np.logaddexp(0, z_B) - y_B * z_B if kind == "binary" else (z_B - y_B) ** 2
    return np.where(weight_B > 0, loss, 0.0), weight_B
