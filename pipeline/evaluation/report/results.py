"""What reports are made of: the records of one split of one dataset, and the oracle's metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from features.errors import UserError
from pipeline.evaluation.metrics.registry import COLUMNS
from pipeline.run.run import Run


@dataclass(frozen=True)
class Results:
    """A run's evaluations.

    Attributes:
        dataset: its name (see Dataset.name). kinds: of the tasks.
        records: one for each step, in order. oracle: metrics per task, None where the true probabilities are not known.
    """

    run: Run
    split: str
    dataset: str
    kinds: dict[str, str]
    records: list[dict[str, Any]]
    oracle: dict[str, dict[str, Any]] | None


def check_complete(records: Iterable[Mapping[str, Any]], kinds: Mapping[str, str], run: Run) -> None:
    """Raises UserError for a record of eval.jsonl that lacks its rows, or a metric of a task that reports show."""
    for record in records:
        missing = [f"{task}.{name}" for task, kind in kinds.items() for name in _missing(record["metrics"], task, kind)]
        missing += [] if record.get("rows") is not None else ["rows"]
        if missing:
            raise UserError(
                f"{run.eval_metrics}: the record of step {record['step']} lacks {missing[0]}. Remove its line: its checkpoint "
                "is evaluated again."
            )


def is_complete(metrics: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]) -> bool:
    """Whether metrics by task have all that reports show."""
    return not any(_missing(metrics, task, kind) for task, kind in kinds.items())


def _missing(metrics: Mapping[str, Mapping[str, Any]], task: str, kind: str) -> list[str]:
    return [name for name in COLUMNS[kind] if name not in metrics.get(task, {})]
