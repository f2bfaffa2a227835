"""A table of a run's evaluations: a line a checkpoint, then the oracle and the share of the gap to it that is closed."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from features.printable import printable
from pipeline.evaluation.metrics.registry import COLUMNS, METRICS
from pipeline.evaluation.report.results import Results
from pipeline.run.headline import HEADLINE


def table(results: Results, style: str = "simple") -> str:
    """Per checkpoint and task: NE, AUC, calibration; NRMSE and R2 for regression.

    Then the best possible values and the share of the way from 1 to them that the last checkpoint has closed.
    """
    kinds = results.kinds
    columns = [(task, kind, name) for task, kind in kinds.items() for name in COLUMNS[kind]]
    header = ["step", "rows seen", *(f"{printable(task)}\n{METRICS[kind][name].label}" for task, kind, name in columns)]
    lines = [[f"{r['step']:,}", f"{r['rows']:,}", *_cells(r["metrics"], kinds)] for r in results.records]
    if (oracle := results.oracle) and results.records:
        last = results.records[-1]["metrics"]
        lines.append(["best", "possible", *_cells(oracle, kinds)])
        gaps = (
            closed_gap(last[t][name], oracle[t][name]) if name == HEADLINE[kind] else None for t, kind, name in columns
        )
        lines.append(["gap", "closed", *("" if gap is None else f"{gap:.0%}" for gap in gaps)])
    return tabulate(lines, header, tablefmt=style, disable_numparse=True, stralign="right")


def closed_gap(value: float | None, oracle: float | None) -> float | None:
    """Share of the way from 1, which the mean label has, to the oracle's value of a headline metric."""
    if value is None or oracle is None or oracle == 1:
        return None
    return (1 - value) / (1 - oracle)


def _cells(metrics: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]) -> list[str]:
    values = [metrics[task][name] for task, kind in kinds.items() for name in COLUMNS[kind]]
    return ["-" if value is None else f"{value:.4f}" for value in values]
