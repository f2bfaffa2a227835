"""A record as scalars by name, the same in TensorBoard and MLflow."""

from math import isfinite
from typing import Any

from pipeline.run.tracking.base import Record


def of_training(record: Record) -> dict[str, float]:
    """`train/loss`, …, and per task `train_ne/TASK`, `train_task_loss/TASK`, `train_weight/TASK`; `search/alpha_entropy`, …."""
    found = {f"train/{key}": record[key] for key in ("lr", "loss", "rows_per_s", "data_wait")}
    for key in ("weight", "ne", "task_loss"):
        found |= {f"train_{key}/{task}": value for task, value in record[key].items()}
    found |= {f"search/{key}": value for key, value in record.get("search", {}).items()}
    return _defined(found)


def of_evaluation(record: Record) -> dict[str, float]:
    """`eval_SPLIT/TASK/METRIC` of the whole split, and `…/low` and `…/high` of the metrics that have bounds."""
    prefix = f"eval_{record['split']}"
    found = {f"{prefix}/{task}/{name}": value for task, m in record["metrics"].items() for name, value in m.items()}
    for task, bounds in record.get("bounds", {}).items():
        for name, (low, high) in bounds.items():
            found |= {f"{prefix}/{task}/{name}/low": low, f"{prefix}/{task}/{name}/high": high}
    for name, value in (record.get("lag") or {}).items():
        found[f"{prefix}_lag/{name}"] = value
    if "rows_per_s" in record:
        found[f"{prefix}_rows_per_s/rows_per_s"] = record["rows_per_s"]
    return _defined(found)


def _defined(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and isfinite(value)}
