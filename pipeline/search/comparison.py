"""Models side by side: differences to a baseline with their confidence intervals, as tables, a picture and Parquet."""

# Shapes: N test rows, S seeds.

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from tabulate import tabulate

from pipeline.evaluation.predictions import row_losses

SHARES = (1 / 7, 3 / 7)  # of the training rows, after which a run is looked at as well (AdaTT, tables 1 and 2)
NORMAL_95 = 1.96


@dataclass
class Entry:
    """One model's runs.

    Attributes:
        runs: a record a seed: `metrics`, `rows_per_s`, `early` (metrics after each of SHARES of the training rows, and all).
        rows: a file of test predictions a seed.
        size: see pipeline.evaluation.size; empty where it does not apply.
    """

    name: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Path] = field(default_factory=list)
    size: dict[str, Any] = field(default_factory=dict)


def differences(entry: Entry, baseline: Entry, tasks: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Per task the difference to the baseline in percent of its NE (regression: of its MSE), and half its 95% interval.

    Both models see the same rows, so rows are paired: d_i is a row's loss under the one, mean over seeds, less that under the
    other. The variance of the mean of d_i over rows is added to that over seeds, paired in order, divided by their number.

    Args:
        tasks: name to kind.
    """
    frames = [[pl.read_parquet(path) for path in e.rows] for e in (entry, baseline)]
    found = {}
    for task, kind in tasks.items():
        loss_SN, base_SN = (np.stack([row_losses(frame, task, kind)[0] for frame in group]) for group in frames)
        weight_N = row_losses(frames[0][0], task, kind)[1]
        total = weight_N.sum()
        d_N = loss_SN.mean(0) - base_SN.mean(0)
        mean = (weight_N * d_N).sum() / total
        variance = ((weight_N * (d_N - mean)) ** 2).sum() / total**2
        seeds = min(len(loss_SN), len(base_SN))
        if seeds > 1:
            d_S = ((loss_SN[:seeds] - base_SN[:seeds]) * weight_N).sum(1) / total
            variance += d_S.var(ddof=1) / seeds
        percent = 100 / ((weight_N * base_SN.mean(0)).sum() / total)
        found[task] = (float(mean * percent), float(NORMAL_95 * np.sqrt(variance) * percent))
    return found


def tables(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str], style: str) -> str:
    """Three tables: quality, cost, and the difference to the baseline as training goes on."""
    quality, cost, early = [], [], []
    for entry in entries:
        gap = differences(entry, baseline, tasks)
        cells = [_mean([run["metrics"][task][_figure(kind)] for run in entry.runs]) for task, kind in tasks.items()]
        cells += [_mean([run["metrics"][task][_loss(kind)] for run in entry.runs]) for task, kind in tasks.items()]
        cells += ["" if entry is baseline else f"{m:+.2f} ±{h:.2f}" for m, h in gap.values()]
        quality.append([entry.name, *cells])
        rate = f"{statistics.median(run['rows_per_s'] for run in entry.runs):,.0f}"
        size = entry.size
        counts = (
            [f"{size[key]:,.0f}" for key in ("parameters", "table_parameters", "flops_per_row")] if size else [""] * 3
        )
        cost.append([entry.name, *counts, rate])
        if entry.runs[0].get("early") and entry is not baseline:
            early.append([entry.name, *(_early(entry, baseline, task, kind, at) for task, kind in tasks.items()
                                        for at in range(len(SHARES) + 1))])  # fmt: skip
    headers = [f"{_figure(kind).upper()} {task}" for task, kind in tasks.items()]
    headers += [f"{_loss(kind).upper()} {task}" for task, kind in tasks.items()]
    headers += [f"{'NE' if kind == 'binary' else 'MSE'} % {task}" for task, kind in tasks.items()]
    shares = [*(f"{round(share * 7)}/7" for share in SHARES), "all"]
    return "\n\n".join(
        tabulate(lines, header, tablefmt=style, disable_numparse=True, stralign="right")
        for lines, header in (
            (quality, ["model", *headers]),
            (cost, ["model", "parameters", "in tables", "FLOPs/row", "rows/s"]),
            (early, [f"NE % to {baseline.name} after", *(f"{task} {share}" for task in tasks for share in shares)]),
        )
        if lines
    )


def parquet(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str], path: Path) -> None:
    """A row a model, seed, task and share of the training rows: every metric, and the model's difference and size."""
    lines = []
    for entry in entries:
        gap = differences(entry, baseline, tasks)
        for seed, run in enumerate(entry.runs):
            for share, metrics in [("chosen", run["metrics"]), *run.get("early", {}).items()]:
                for task in tasks:
                    known = {"difference_percent": gap[task][0], "half_interval_percent": gap[task][1], **entry.size}
                    lines.append({"model": entry.name, "seed": seed, "at": share, "task": task, **metrics[task],
                                  **known, "rows_per_s": run["rows_per_s"]})  # fmt: skip
    pl.DataFrame(lines, infer_schema_length=None).write_parquet(path)


def picture(entries: Sequence[Entry], baseline: Entry, tasks: Mapping[str, str]) -> Figure:
    """The differences to the baseline with their intervals, a panel a task; left of 0 is better."""
    others = [entry for entry in entries if entry is not baseline]
    gaps = [differences(entry, baseline, tasks) for entry in others]
    figure = Figure(figsize=(1.6 + 3.2 * len(tasks), 1.4 + 0.28 * len(others)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, (task, kind) in zip(panels, tasks.items(), strict=True):
        for place, gap in enumerate(gaps):
            mean, half = gap[task]
            color = "tab:green" if mean + half < 0 else "tab:red" if mean - half > 0 else "tab:gray"
            axes.errorbar(mean, place, xerr=half, fmt="o", color=color, capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=task, xlabel=f"{'NE' if kind == 'binary' else 'MSE'} to {baseline.name}, %")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(others)), [entry.name for entry in others])
    panels[0].invert_yaxis()
    return figure


def _figure(kind: str) -> str:
    return "auc" if kind == "binary" else "r2"


def _loss(kind: str) -> str:
    return "ne" if kind == "binary" else "nrmse"


def _early(entry: Entry, baseline: Entry, task: str, kind: str, at: int) -> str:
    """Difference in percent of the mean over seeds, after a share of the training rows."""
    ours, theirs = (
        statistics.mean(list(run["early"].values())[at][task][_loss(kind)] for run in e.runs) for e in (entry, baseline)
    )
    power = 1 if kind == "binary" else 2  # squares, as elsewhere
    return f"{100 * (ours**power / theirs**power - 1):+.2f}"


def _mean(values: list[float]) -> str:
    deviation = f"±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}".replace("0.", ".")
