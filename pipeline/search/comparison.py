"""Differences of models to a baseline, with their confidence intervals."""

# Shapes: N test rows, S seeds.

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation import predictions
from pipeline.evaluation.predictions import row_losses

SHARES = (1 / 7, 3 / 7)  # of the training rows, after which runs are compared too (AdaTT, tables 1 and 2)
NORMAL_95 = 1.96
PAIRED = {"binary": "NE", "regression": "MSE"}  # what a row's loss averages to, up to a factor that cancels in percent


@dataclass
class Entry:
    """One model's runs.

    Attributes:
        runs: a record a seed: `metrics`, `rows_per_s`, `early` (metrics after each of SHARES of the training rows, and all); of
            networks also `run` (its folder's name), `step`, `hours` (core-hours of all training that it took) and
            `search_hours` (of its searches alone; None without one).
        rows: a file of test predictions a seed.
        cost: see pipeline.evaluation.model_cost, the mean over seeds; empty where it does not apply.
    """

    name: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Path] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)


def differences(entry: Entry, baseline: Entry, tasks: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """Per task the difference to the baseline in percent of its NE (regression: of its MSE), and half its 95% interval.

    Both models predict the same rows, so rows are paired: d_i is a row's loss under the one, mean over seeds, less that under
    the other. The variance of the mean of d_i over rows is added to that over seeds, paired in order, divided by their number.

    Args:
        tasks: name to kind.
    """
    frames = [[predictions.read(path) for path in e.rows] for e in (entry, baseline)]
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
