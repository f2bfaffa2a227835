"""Gradient-boosted trees on a dataset: the baselines that a network has to beat."""

# Shapes: N rows, D columns, T tasks, F features, G bags.

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from features.batch import Rows
from features.errors import UserError, one_line
from features.fit.fitted_files import RESTORE_HINT
from features.schema.schema import Schema, Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.shards import open_shard
from pipeline.evaluation import predictions
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.rmtgb import OWN, RobustBoosting, TaskRows

MAX_CATEGORIES = 255  # of scikit-learn's trees; a larger vocabulary counts as a number, its ids go by frequency
MAX_ITER = 1500
INPUTS = "inputs"  # one column of all of them
SETTINGS = {"learning_rate": 0.05, "max_iter": MAX_ITER, "early_stopping": True, "n_iter_no_change": 30}


def boosted_trees(dataset: Dataset, max_rows: int, seed: int, file: Path) -> dict[str, Any]:
    """Fits histogram gradient boosting on the train split with early stopping on valid, and predicts the test split.

    Inputs are those of the networks: dense columns, ids as categories, of bags their lengths.

    Args:
        max_rows: of the train split, its first ones. seed: of the split finder. file: of the test rows' predictions.
    Returns: metrics per task, rows/s of fitting and predicting, trees per task.
    Raises:
        UserError: a split is empty, a task is not observed in train or valid, or has soft labels or those of one class.
    """
    data = _Splits.read(dataset, max_rows)
    for task, settings in dataset.schema.tasks.items():
        if fault := data.not_for_boosting(task, settings.kind == "binary"):
            raise UserError(f"tasks.{task} {fault}, which boosted trees cannot take. Set trees=[rmtgb] or trees=[].")
    raw, trees, begin = {}, {}, time.perf_counter()
    for task, settings in dataset.schema.tasks.items():
        label = f"label.{task}"
        kind = HistGradientBoostingClassifier if settings.kind == "binary" else HistGradientBoostingRegressor
        fitted, stopping = _observed(data.train, task), _observed(data.valid, task)
        model = kind(categorical_features=data.categorical, random_state=seed, **SETTINGS).fit(
            fitted[INPUTS].to_numpy(), fitted[label].to_numpy(), sample_weight=fitted["weight"].to_numpy(),
            X_val=stopping[INPUTS].to_numpy(), y_val=stopping[label].to_numpy(),
            sample_weight_val=stopping["weight"].to_numpy(),
        )  # fmt: skip
        trees[task] = int(model.n_iter_)
        predict = model.decision_function if settings.kind == "binary" else model.predict
        raw[task] = predict(data.test[INPUTS].to_numpy())
    return data.record(raw, file, begin) | {"trees": trees}


def robust_trees(dataset: Dataset, max_rows: int, seed: int, file: Path) -> dict[str, Any]:
    """Fits R-MTGB (`RobustBoosting`) on the same rows and inputs as `boosted_trees`.

    Args: as there; seed: of the partition's start.
    Returns: as there, a task's trees with those that it shares, and each task's weight of the outliers' trees.
    Raises:
        UserError: a split is empty, or a task is not observed in train or valid.
    """
    data, tasks = _Splits.read(dataset, max_rows), dataset.schema.tasks
    begin = time.perf_counter()
    train, valid = data.labelled(data.train), data.labelled(data.valid)
    model = RobustBoosting([task.kind == "binary" for task in tasks.values()], data.categorical, seed=seed)
    model.fit(train, valid)
    raw_NT = model.predict(data.test[INPUTS].to_numpy())
    common = sum(len(trees) for trees in model.trees[:OWN])
    own = {task: common + len(trees) for task, trees in zip(tasks, model.trees[OWN:], strict=True)}
    weight = dict(zip(tasks, model.outlier_weight_T().tolist(), strict=True))
    return data.record(dict(zip(tasks, raw_NT.T, strict=True)), file, begin) | {"trees": own, "outlier_weight": weight}


TREES = {"boosted": boosted_trees, "rmtgb": robust_trees}


@dataclass(frozen=True)
class _Splits:
    """The rows of each split, their inputs as one column, and which inputs are categories."""

    schema: Schema
    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    categorical: list[bool]

    @classmethod
    def read(cls, dataset: Dataset, max_rows: int) -> "_Splits":
        """Raises UserError where a split is empty, or a task is not observed in the rows that trees learn or stop by."""
        schema = dataset.schema
        train, valid, test = (_rows(dataset, split) for split in ("train", "valid", "test"))
        categories = [_categorical(dataset, name) for name in schema.single]
        mask = [*[False] * schema.dense_width, *categories, *[False] * len(schema.lists)]
        data = cls(schema, train.head(max_rows), valid, test, mask)
        for task in schema.tasks:
            if not _observed(data.train, task)["weight"].sum():
                raise UserError(
                    f"tasks.{task} is not observed in the first {max_rows} train rows, so no trees can learn it. Raise "
                    "trees_max_rows, or set trees=[]."
                )
            if not _observed(data.valid, task)["weight"].sum():
                raise UserError(
                    f"tasks.{task} is not observed in valid, where the number of trees is found. Set trees=[]."
                )
        return data

    def not_for_boosting(self, task: str, binary: bool) -> str | None:
        """What of a task's labels scikit-learn refuses."""
        train, valid = (_observed(rows, task) for rows in (self.train, self.valid))
        labels = pl.concat([train, valid])[f"label.{task}"]
        if binary and not labels.is_in([0.0, 1.0]).all():
            return "has soft labels"
        if binary and train[f"label.{task}"].n_unique() == 1:
            return "has labels of one class in train"
        return None

    def labelled(self, rows: pl.DataFrame) -> TaskRows:
        label_NT = rows.select(pl.col(f"label.{t}") for t in self.schema.tasks).cast(pl.Float64).to_numpy()
        return TaskRows(rows[INPUTS].to_numpy(), label_NT, rows["weight"].to_numpy().astype(np.float64))

    def record(self, raw: dict[str, np.ndarray], file: Path, begin: float) -> dict[str, Any]:
        """Writes the test rows' predictions, and returns metrics and rows/s since `begin`."""
        columns = self.test.select("row_id", "weight", *(f"label.{task}" for task in self.schema.tasks))
        rows = columns.with_columns(pl.Series(f"logit.{task}", raw_N.astype(np.float32)) for task, raw_N in raw.items())
        predictions.write(rows, file)
        seconds = time.perf_counter() - begin
        return {"metrics": _metrics(rows, self.schema), "rows_per_s": self.train.height / seconds}


def _observed(rows: pl.DataFrame, task: str) -> pl.DataFrame:
    return rows.drop_nulls(f"label.{task}")


def _rows(dataset: Dataset, split: Split) -> pl.DataFrame:
    try:
        columns = [name for name in dataset.columns.names if name not in dataset.schema.kept]
        table = pa.concat_tables(open_shard(dataset, shard, columns).read(columns) for shard in dataset.shards(split))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{dataset.path}: a shard of {split} cannot be read ({one_line(error)}). {RESTORE_HINT}"
        ) from None
    rows = Rows.decode(table, dataset.schema)
    x_ND = torch.cat([rows.dense_ND, rows.id_NF.float(), rows.length_NG.float()], 1)
    frame: pl.DataFrame = pl.from_arrow(table.drop_columns(list(dataset.schema.columns)))  # type: ignore[assignment]
    return frame.with_columns(pl.Series(INPUTS, x_ND.numpy()))


def _categorical(dataset: Dataset, feature: str) -> bool:
    table = dataset.schema.table_of(feature)
    settings = dataset.schema.all_tables[table]
    return not (settings.bins or settings.managed) and dataset.encoders.num_embeddings(table) <= MAX_CATEGORIES


def _metrics(rows: pl.DataFrame, schema: Schema) -> dict[str, dict[str, float | int | None]]:
    metrics = Metrics([(name, task.kind) for name, task in schema.tasks.items()])
    logit_NT, label_NT = (
        torch.tensor(rows.select(pl.col(f"{column}.{t}") for t in schema.tasks).cast(pl.Float32).to_numpy())
        for column in ("logit", "label")
    )
    weight_NT = torch.tensor(rows["weight"].to_numpy()).unsqueeze(1).expand(label_NT.shape)
    metrics.update(logit_NT, label_NT.nan_to_num(0.0), ~label_NT.isnan(), weight_NT)
    return metrics.compute()
