"""The metric by which checkpoints and models are compared, by kind of task: retention, verdicts, reports and comparisons."""

from collections.abc import Mapping
from typing import Any

from features.errors import UserError

HEADLINE = {"binary": "ne", "regression": "nrmse"}  # lower is better, 1 is no better than the mean label
RANKING = {"binary": "auc", "regression": "r2"}  # higher is better, defined without a threshold or calibration


def headline(metrics: Mapping[str, Any]) -> str:
    """The name of a task's headline metric, by the metrics that its record has. Raises UserError for a record without one."""
    for name in HEADLINE.values():
        if name in metrics:
            return name
    raise UserError(
        f"an evaluation has none of the metrics {', '.join(HEADLINE.values())}; remove its line from eval.jsonl"
    )


def why_undefined(metrics: Mapping[str, Any]) -> str:
    """Why a task's headline metric has no value, from its other metrics."""
    rows, non_finite, positives = (metrics.get(name) for name in ("rows", "non_finite", "positives"))
    if rows == 0:
        return "no rows"
    if rows and non_finite:
        return f"{non_finite:,.0f} of {rows:,.0f} predictions are not finite"
    if positives is not None and positives in (0, rows):
        return "all labels are 1" if positives else "no label is 1"
    return "all labels are equal" if metrics.get("mse") is not None else "no finite value"
