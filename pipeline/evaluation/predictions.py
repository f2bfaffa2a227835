"""A checkpoint's prediction of each row of a split, as a Parquet file.

Its columns: `row_id`; the kept columns of the dataset by their raw names (`raw.NAME` where another column has that name), null
where the log gives several rows one id; `weight`; per task `logit.TASK` (regression: the prediction), `label.TASK` (null: not
observed), and what a person reads, `prob.TASK` of a binary and `prediction.TASK` of a regression task, in the label's unit.
Files of earlier releases have neither kept columns nor the last two.
"""

# Shapes: B rows, T tasks.

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from features.batch import Batch
from features.errors import UserError, one_line
from features.fit.fitted_files import RESTORE_HINT
from features.parquet_limits import check_file
from features.parquet_schema import check_nesting_of
from features.regular_files import lstat_regular
from features.schema.kept import kept_column
from features.schema.schema import Schema, Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.shards import open_shard, with_plain_texts
from pipeline.run.run import Run
from pipeline.storage.files import make_folder, whole
from pipeline.storage.patience import cure_of
from pipeline.storage.uploading import uploading


def path(run: Run, split: str, step: int) -> Path:
    """Where the predictions of a checkpoint are kept."""
    return run.path / "predictions" / f"{split}-{step:08d}.parquet"


def frame(batch: Batch, logit_BT: Tensor, schema: Schema) -> pl.DataFrame:
    """The columns of a batch's rows, without padding, but for kept ones."""
    real_B = batch.row_id_B >= 0
    label_BT = torch.where(batch.observed_BT, batch.label_BT, torch.nan)
    columns = {"row_id": batch.row_id_B, "weight": batch.weight_BT[:, 0]}
    for t, task in enumerate(schema.tasks):
        columns |= {f"logit.{task}": logit_BT[:, t].float(), f"label.{task}": label_BT[:, t]}
    columns |= answers(logit_BT, schema)
    return pl.DataFrame({name: column[real_B].numpy() for name, column in columns.items()}).fill_nan(None)


def answers(logit_BT: Tensor, schema: Schema) -> dict[str, Tensor]:
    """Per task the column `prob.TASK`, or of a regression task `prediction.TASK`, in the label's unit; float32 (B,)."""
    found: dict[str, Tensor] = {}
    for t, (name, task) in enumerate(schema.tasks.items()):
        z_B = logit_BT[:, t].float()
        found |= {f"prob.{name}": torch.sigmoid(z_B)} if task.kind == "binary" else {f"prediction.{name}": z_B}
    return found


def kept_names(schema: Schema, others: Iterable[str]) -> dict[str, str]:
    """The columns of a dataset that hold kept ones, with their names in a file of predictions that has `others` too."""
    taken = {*others}
    return {kept_column(name): kept_column(name) if name in taken else name for name in schema.keep}


def kept_rows(dataset: Dataset, splits: Sequence[Split]) -> pl.DataFrame:
    """row_id and the kept columns of all rows of some splits. Raises UserError for a shard that cannot be read."""
    frames = []
    for shard in (shard for split in splits for shard in dataset.shards(split)):
        rows: pl.DataFrame = pl.from_arrow(shard_columns(dataset, shard, ["row_id", *dataset.schema.kept]))  # type: ignore[assignment]
        frames.append(rows.with_columns(pl.col("row_id") + dataset.row_id_offset(shard)))
    return pl.concat(frames)


def with_kept(rows: pl.DataFrame, dataset: Dataset, splits: Sequence[Split]) -> pl.DataFrame:
    """Rows of predictions with the kept columns of their dataset, null where several rows have one row_id: not another's.

    Raises:
        UserError: as `kept_rows`.
    """
    if not dataset.schema.keep:
        return rows
    names = kept_names(dataset.schema, rows.columns)
    kept = kept_rows(dataset, splits).rename(names).unique("row_id", keep="none")
    others = [name for name in rows.columns if name != "row_id"]
    return rows.join(kept, on="row_id", how="left").select("row_id", *names.values(), *others)


def shard_columns(dataset: Dataset, shard: Shard, columns: Sequence[str]) -> pa.Table:
    """Some columns of a shard. Raises UserError where it cannot be read."""
    path = dataset.path / shard.path
    try:
        with open_shard(dataset, shard, columns) as file:
            groups = (file.read_row_group(group, columns=[*columns]) for group in range(file.num_row_groups))
            return pa.concat_tables([with_plain_texts(group, path) for group in groups])
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}). {RESTORE_HINT}") from None


def write(rows: pl.DataFrame, file: Path, provenance: dict[str, str] | None = None) -> None:
    """Writes the rows atomically; `provenance` is kept in the file's metadata, see `is_from`."""
    make_folder(file.parent)
    with uploading(file) as opened:
        rows.sort("row_id").write_parquet(opened, metadata=provenance)


def is_from(file: Path, provenance: dict[str, str]) -> bool:
    """Whether a file exists and was written with this provenance. Raises UserError for a link, or columns nested too deep."""
    try:
        if lstat_regular(file.parent, file.name) is None:
            return False
        check_nesting_of(file)
        with file.open("rb") as opened:  # of which only the footer is read, wherever it is
            found = pq.read_metadata(opened).metadata or {}
    except (OSError, pa.ArrowException):
        return False  # damaged: it is written again
    return all(found.get(key.encode()) == value.encode() for key, value in provenance.items())


def read(file: Path, hint: str = "Remove it: jobs.evaluate writes it again.") -> pl.DataFrame:
    """Rows that `write` wrote. Raises UserError, which ends in `hint`, for a file that cannot be read; also for a link, or one
    that unpacks to too much.
    """
    try:
        if lstat_regular(file.parent, file.name) is not None:
            check_file(file)
        return pl.read_parquet(whole(file), glob=False)
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}). {cure_of(error, hint)}") from None


def row_losses(rows: pl.DataFrame, task: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each row in float64, in nats (regression: squared error), and its weight, which is 0 where not observed."""
    z_B, y_B = (rows[f"{column}.{task}"].to_numpy().astype(np.float64) for column in ("logit", "label"))
    weight_B = np.where(np.isnan(y_B), 0.0, rows["weight"].to_numpy().astype(np.float64))
    loss = np.logaddexp(0, z_B) - y_B * z_B if kind == "binary" else (z_B - y_B) ** 2
    return np.where(weight_B > 0, loss, 0.0), weight_B
