"""A dataset again, its train labels being the predictions of a run: what a smaller or later model learns from a teacher."""

# Shapes: B rows.

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from features.errors import UserError, one_line
from features.fit.fitted_files import RESTORE_HINT
from features.printable import printable
from features.regular_files import mounted
from features.schema.schema import Schema, Split
from pipeline.dataset.dataset import Dataset, require_file
from pipeline.dataset.entries import Listed, Shard
from pipeline.dataset.listing import each_of
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import open_shard, with_plain_texts
from pipeline.evaluation import predictions
from pipeline.ingest.staging import staging_of
from pipeline.ingest.steps.write import write_shard
from pipeline.storage.files import copy_file, remove_tree, storage_of, write_json
from pipeline.storage.staging import recover
from pipeline.storage.store_path import Place

SPLIT: Split = "train"  # valid and test keep their labels, so that models of either are measured alike
HINT = "Write them with jobs.evaluate run=RUN dataset=DATASET split=train predictions=true."


class RelabelConfig(BaseModel):
    """Settings of jobs.relabel; see jobs/conf/relabel.yaml."""

    model_config = ConfigDict(extra="forbid")
    dataset: Place
    predictions: Place
    out: Place


def relabel(config: RelabelConfig) -> Manifest:
    """Commits the dataset with predictions as labels: probabilities of binary tasks, of regression the label's own unit.

    A label is replaced where it is observed; tasks without predictions keep theirs, and so do valid and test. Rows, order,
    encoders and the schema with its fingerprint stay, so that runs on either dataset can start from each other's weights
    (train.init_from). Files that stay are hard links where the file system has them, else copies. statistics.json still
    describes the labels of the log. A task that others are given has no label of 0 any more, from which esmm, ipw and dr
    conclude that these did not happen: train with model.given.name=observed.

    Args:
        config: `predictions` are read whole, some 10 bytes a row and task.
    Returns: the manifest of the new dataset.
    Raises:
        UserError: `out` exists; no dataset; predictions of other rows, labels or tasks, or such that are not finite.
    """
    out = config.out.resolve()
    recover(out)
    _check_new(out)
    dataset = Dataset(config.dataset)
    rows = _predictions(config.predictions, dataset)
    manifest = dataset.manifest
    with staging_of(out) as staging:
        shards, stays = [], ["schema.yaml"]
        for shard in manifest.shards:
            (staging / shard.path).parent.mkdir(parents=True, exist_ok=True)
            if shard.split == SPLIT and shard.rows:
                shards.append(_relabelled(dataset, shard, rows, staging, config.predictions))
            else:
                stays.append(shard.path)
                shards.append(shard)
        states = manifest.state.files if manifest.state else []
        others: list[Listed] = [*manifest.dead_letter_files, *manifest.fitted, *states]
        stays += [file.path for file in others]
        each_of(staging, lambda name: _link(dataset.path, name, staging), stays)
        sums = {task: sum(s.positives[task] for s in shards if s.split == SPLIT) for task in dataset.schema.tasks}
        made = manifest.model_copy(update={"shards": shards, "positives": manifest.positives | {SPLIT: sums}})
        write_json(staging / "manifest.json", made.model_dump(by_alias=True))
        remove_tree(staging / "scratch")
        _check_new(out)  # another job may have been faster
        storage_of(out).commit(staging, out)
    return made


def _check_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists. Choose another out=.")


def _predictions(file: Path, dataset: Dataset) -> pl.DataFrame:
    """The predictions, sorted by row_id. Raises UserError for other rows or tasks, or a number that is not finite."""
    if not file.is_file():
        raise UserError(f"{file}: no file of predictions. {HINT}")
    rows = predictions.read(file, HINT)  # the file is a user's word: it may be anything
    tasks = [name.removeprefix("logit.") for name in rows.columns if name.startswith("logit.")]
    if unknown := [task for task in tasks if task not in dataset.schema.tasks]:
        raise UserError(f"{file}: predicts {printable(unknown[0])}, which is no task of {dataset.path}. {HINT}")
    wanted = {"row_id": pl.Int64} | {f"{kind}.{task}": pl.Float32 for task in tasks for kind in ("logit", "label")}
    if not tasks or any(rows.schema.get(name) != kind for name, kind in wanted.items()):
        raise UserError(f"{file}: has no column {', '.join(map(printable, wanted))} of predictions. {HINT}")
    row_id_B = rows["row_id"].to_numpy()
    if rows["row_id"].null_count() or (row_id_B[1:] <= row_id_B[:-1]).any():
        raise UserError(f"{file}: a row_id is missing, repeated or not in order. {HINT}")
    if rows.height != dataset.manifest.rows[SPLIT]:
        raise UserError(
            f"{file}: has {rows.height:,} rows, {SPLIT} of {dataset.path} has {dataset.manifest.rows[SPLIT]:,}. {HINT}"
        )
    for task in tasks:
        if not np.isfinite(rows[f"logit.{task}"].to_numpy()).all():
            raise UserError(
                f"{file}: a prediction of {printable(task)} is not finite. Predict with another checkpoint."
            )
    return rows


def _relabelled(dataset: Dataset, shard: Shard, rows: pl.DataFrame, staging: Path, file: Path) -> Shard:
    """Writes a shard with its new labels; returns its entry of the manifest."""
    try:
        with open_shard(dataset, shard) as parquet:
            path = dataset.path / shard.path
            groups = (with_plain_texts(parquet.read_row_group(g), path) for g in range(parquet.num_row_groups))
            tables = _with_labels(groups, rows, dataset.schema, file, path)
            return write_shard(staging / shard.path, staging, SPLIT, dataset.schema, tables, max(shard.row_groups))
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{dataset.path / shard.path}: cannot be read ({one_line(error)}). {RESTORE_HINT}") from None


def _with_labels(
    tables: Iterator[pa.Table], rows: pl.DataFrame, schema: Schema, file: Path, shard: Path
) -> Iterator[pa.Table]:
    known_B = rows["row_id"].to_numpy()
    for table in tables:
        row_id_B = table["row_id"].to_numpy()
        place_B = np.searchsorted(known_B, row_id_B).clip(max=len(known_B) - 1)
        if (lacking := known_B[place_B] != row_id_B).any():
            raise UserError(f"{file}: lacks row_id {row_id_B[lacking][0]} of {shard}. {HINT}")
        for task, settings in schema.tasks.items():
            if f"logit.{task}" not in rows.columns:
                continue
            found, name = rows[place_B], f"label.{task}"
            label: pl.Series = pl.from_arrow(table[name])  # type: ignore[assignment]
            if not label.eq_missing(found[name]).all():
                raise UserError(f"{file}: labels of {printable(task)} are not those of {shard}. {HINT}")
            logit_B = found[f"logit.{task}"].to_numpy()
            value_B = _probability(logit_B) if settings.kind == "binary" else logit_B
            new = pa.array(value_B.astype(np.float32), mask=label.is_null().to_numpy())
            table = table.set_column(table.column_names.index(name), table.schema.field(name), new)
        yield table


def _probability(logit_B: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logit_B.astype(np.float64)))


def _link(folder: Path, name: str, staging: Path) -> None:
    """The same file below another folder. Raises UserError where it is missing, a link or no regular file."""
    file, copy = require_file(folder, name), staging / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if mounted(file) and mounted(copy):
        with suppress(OSError):  # another file system, or one without links
            os.link(file, copy)
            return
    copy_file(file, copy)
