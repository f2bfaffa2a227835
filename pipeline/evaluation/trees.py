"""Gradient-boosted trees on a dataset, one model a task: the baseline that a network has to beat."""

# Shapes: N rows, D columns.

import time
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
        UserError: a split is empty, or a task has soft labels, which these trees cannot take.
    """
    schema = dataset.schema
    train, valid, test = (_rows(dataset, split) for split in ("train", "valid", "test"))
    train = train.head(max_rows)
    categories = [_categorical(dataset, name) for name in schema.single]
    mask = [*[False] * schema.dense_width, *categories, *[False] * len(schema.lists)]
    result = test.select("row_id", "weight", *(f"label.{task}" for task in schema.tasks))
    trees, begin = {}, time.perf_counter()
    for task, settings in schema.tasks.items():
        label = f"label.{task}"
        if settings.kind == "binary" and not train[label].drop_nulls().is_in([0.0, 1.0]).all():
            raise UserError(f"tasks.{task} has soft labels, which boosted trees cannot take. Set trees=false.")
        kind = HistGradientBoostingClassifier if settings.kind == "binary" else HistGradientBoostingRegressor
        fitted, stopping = train.drop_nulls(label), valid.drop_nulls(label)
        model = kind(categorical_features=mask, random_state=seed, **SETTINGS).fit(
            fitted[INPUTS].to_numpy(), fitted[label].to_numpy(), sample_weight=fitted["weight"].to_numpy(),
            X_val=stopping[INPUTS].to_numpy(), y_val=stopping[label].to_numpy(),
            sample_weight_val=stopping["weight"].to_numpy(),
        )  # fmt: skip
        trees[task] = int(model.n_iter_)
        predict = model.decision_function if settings.kind == "binary" else model.predict
        result = result.with_columns(pl.Series(f"logit.{task}", predict(test[INPUTS].to_numpy()).astype(np.float32)))
    predictions.write([result], file)
    seconds = time.perf_counter() - begin
    return {"metrics": _metrics(result, schema), "rows_per_s": train.height / seconds, "trees": trees}


def _rows(dataset: Dataset, split: Split) -> pl.DataFrame:
    try:
        table = pa.concat_tables(open_shard(dataset, shard).read() for shard in dataset.shards(split))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{dataset.path}: a shard of {split} cannot be read ({one_line(error)}). {RESTORE_HINT}"
        ) from None
    rows = Rows.decode(table, dataset.schema)
    x_ND = torch.cat([rows.dense_ND, rows.id_FN.t().float(), rows.length_GN.t().float()], 1)
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
