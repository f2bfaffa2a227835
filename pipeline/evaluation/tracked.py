"""The evaluation of a split as a job whose figures are tracked (pipeline.run.tracking)."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.evaluation.lockstep import rank_of
from pipeline.evaluation.metrics.intervals import reach_of
from pipeline.run.headline import HEADLINE
from pipeline.run.run import Run
from pipeline.run.tracking import mlflow
from pipeline.run.tracking.base import Job, Published
from pipeline.run.tracking.registry import SINKS, Sinks, check, opened
from pipeline.run.tracking.settings import TrackingSettings

CONFIDENCE = 0.95  # of the two-sided intervals


def series_of(split: str, dataset: str | None, share: float = 1.0) -> str:
    """The name of a split's curves: eval_SPLIT, and of another dataset than the run's own one that is no folder's alone.

    Curves of a share of the split are others than those of the whole: one would replace the other's.

    Args:
        dataset: see Dataset.name; None: the run's own. share: of the split that is scored.
    """
    part = "" if share == 1 else f"_share_{share:.6g}".replace(".", "_")
    if dataset is None:
        return f"eval_{split}{part}"
    shown = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in Path(dataset).name)[:40]
    return f"eval_{split}_{shown}-{hashlib.sha256(dataset.encode()).hexdigest()[:6]}{part}"


def with_bounds(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of eval.jsonl with `bounds` {task: {metric: [low, high]}} of the headline metrics that have intervals."""
    errors = record.get("intervals") or {}
    bounds: dict[str, dict[str, list[float]]] = {}
    for task, metrics in record["metrics"].items():
        for name in HEADLINE.values():
            value, error = metrics.get(name), errors.get(task, {}).get(name)
            reach = reach_of(record, task, name, CONFIDENCE)
            if value is not None and error is not None and reach >= 0:
                bounds.setdefault(task, {})[name] = [value - reach * error, value + reach * error]
    return {**record, "bounds": bounds}


def check_settings(settings: TrackingSettings) -> None:
    """Raises UserError on the first rank where a package is missing or a port is in use."""
    if rank_of()[0] == 0:
        check(settings)


def tracked(
    settings: TrackingSettings, run: Run, split: str, series: str, known: Iterable[Mapping[str, Any]]
) -> AbstractContextManager[Sinks]:
    """The sinks of an evaluation; on ranks but the first there are none.

    Args:
        series: see `series_of`. known: the records by now, of which sinks lack those that a killed evaluator did not send.
    Raises:
        UserError: see `opened`.
    """
    job = Job(run, series, split, history=[with_bounds(record) for record in known])
    return opened(job, settings, SINKS if rank_of()[0] == 0 else {})


def publish(settings: TrackingSettings, run: Run, split: str, series: str, file: Path) -> None:
    """Sends a page to MLflow, where the settings ask for it."""
    with opened(Job(run, series, split), settings, {"MLflow": mlflow.open_sink}) as sinks:
        sinks.handle(Published(file))
