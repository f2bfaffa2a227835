"""Simulated logs of users whose rows are not independent, with models whose metrics in the population are known.

A user has a random effect on the logit of a click and on what is spent, of which models know a part; models have an error
for each user and one for each row. Active users click more. The number of rows of a user has a heavy tail: two fifths of all
rows are of a tenth of the users.
"""

# Shapes: N rows, U users, V numbers of rows that a user can have, M models.

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.metrics.base import Grouping
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.metrics.sums import Sums

MOST_ROWS = 300  # of a user
TAIL = 1.5  # exponent of the tail of rows a user, from 3 rows on
DIMENSIONS = ("device", "country")
SLICES = (("device=tablet",), ("country=rare",))  # of a fifth of the rows, of a hundredth of the users
USER_ERROR, ROW_ERROR = 0.1, 0.15  # standard deviations of a model's errors, in logits
TASKS = [("click", "binary"), ("spend", "regression")]


@dataclass(frozen=True)
class SimulatedLog:
    """Rows, their labels and the predictions of M models.

    Attributes:
        user_N: number of the row's user. user_hash_N, row_hash_N: below 2^32.
        logit_MN: of a click, by each model. prediction_N: of what is spent, by the first model.
        tablet_N, rare_N: whether the row is in each slice.
    """

    user_N: np.ndarray
    user_hash_N: np.ndarray
    row_hash_N: np.ndarray
    click_N: np.ndarray
    spend_N: np.ndarray
    logit_MN: np.ndarray
    prediction_N: np.ndarray
    tablet_N: np.ndarray
    rare_N: np.ndarray


def numbers_of_rows(rng: np.random.Generator, users: int, by_row: bool = False) -> np.ndarray:
    """How many rows each user has, (U,).

    Args:
        by_row: of the users of rows drawn evenly, instead of users drawn evenly: those with many rows are more often there.
    """
    count_V = np.arange(1, MOST_ROWS + 1)
    above_V = np.minimum(1, (3 / count_V) ** TAIL)
    share_V = above_V - np.append(above_V[1:], 0)
    if by_row:
        share_V = share_V * count_V
    return count_V[np.searchsorted(share_V.cumsum() / share_V.sum(), rng.random(users))]


def simulate(
    rng: np.random.Generator, users: int, error_M: tuple[float, ...] = (1.0, 1.0), one_row: bool = False
) -> SimulatedLog:
    """A log of independent users.

    Args:
        error_M: the size of each model's own errors, in those of the first. Models of the same size are equally good.
        one_row: one row of each user, as rows drawn evenly from the population: independent, and distributed as all are.
    """
    count_U = numbers_of_rows(rng, users, by_row=one_row)
    effect_U = 0.7 * rng.normal(size=users) + 0.15 * (np.log(count_U) - 1.5)
    rare_U = rng.random(users) < 0.01
    effect_U += 0.5 * rare_U
    user_N = np.arange(users) if one_row else np.repeat(np.arange(users), count_U)
    rows = len(user_N)
    feature_N, tablet_N, effect_N = rng.normal(size=rows), rng.random(rows) < 0.2, effect_U[user_N]
    known_N = 0.9 * feature_N + 0.3 * tablet_N + 0.6 * effect_N - 1.95
    errors_N = [
        size * (USER_ERROR * rng.normal(size=users)[user_N] + ROW_ERROR * rng.normal(size=rows)) for size in error_M
    ]
    logit_N = feature_N + 0.3 * tablet_N + effect_N - 2
    spend_error_N = (0.2 * rng.normal(size=users))[user_N]
    return SimulatedLog(
        user_N,
        rng.integers(0, 1 << 32, users)[user_N],
        rng.integers(0, 1 << 32, rows),
        (rng.random(rows) < 1 / (1 + np.exp(-logit_N))).astype(np.float32),
        (5 + 2 * feature_N + effect_N + rng.normal(size=rows)).astype(np.float32),
        np.stack([known_N + error_N for error_N in errors_N]).astype(np.float32),
        (5.1 + 1.8 * feature_N + 0.5 * effect_N + spend_error_N).astype(np.float32),
        tablet_N,
        rare_U[user_N],
    )


def metrics_of(
    log: SimulatedLog,
    model: int = 0,
    buckets: int = 100,
    by_user: bool = True,
    sliced: bool = True,
    spend: bool = False,
    halvings: int = 0,
) -> Metrics:
    """One model's metrics.

    Args:
        by_user: whether the rows of a user share a bucket; otherwise each row is a cluster of its own.
        spend: with the second task, of the first model. halvings: of the users whose rows are kept for ranking metrics.
    """
    tasks = TASKS if spend else TASKS[:1]
    grouping = Grouping(SLICES if sliced else (), buckets, halvings=halvings)
    metrics = Metrics(tasks, grouping, DIMENSIONS if sliced else ())
    output_BT, label_BT = (
        torch.from_numpy(np.column_stack(columns[: len(tasks)]))
        for columns in ((log.logit_MN[model], log.prediction_N), (log.click_N, log.spend_N))
    )
    keys = [log.user_hash_N if by_user else log.row_hash_N, log.user_N]
    keys += [np.where(inside_N, 0, -1) for inside_N in (log.tablet_N, log.rare_N)] if sliced else []
    observed_BT = torch.ones_like(label_BT, dtype=torch.bool)
    metrics.update(output_BT, label_BT, observed_BT, torch.ones_like(label_BT), torch.from_numpy(np.column_stack(keys)))
    return metrics


def evaluated_of(metrics: Metrics, names: tuple[str, ...] = ()) -> Evaluated:
    """All of their figures, as an evaluation of a checkpoint gives them.

    Args:
        names: of the click alone these, of sums: the rows are not sorted.
    """
    if names:
        sums = metrics.statistics[Sums].of_task(0)
        figures = {"click": {name: METRICS["binary"][name].compute(sums) for name in ("rows", *names)}}
    else:
        figures = metrics.figures()
    provenance = Provenance(
        run="a", step=1, checkpoint="c", dataset="d", split="test", cluster="user", buckets=metrics.grouping.buckets
    )
    return Evaluated(metrics.frame(figures), provenance)
