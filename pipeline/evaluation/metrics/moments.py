"""Counts, weights and second moments of each task's rows: what regression metrics are computed from."""

# Shapes: T tasks.

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from pipeline.evaluation.metrics.base import Rows, Tasks

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class TaskMoments:
    """Of one task's rows that count.

    Attributes:
        rows: how many.
        non_finite: those whose prediction is NaN or infinite.
        positives: sum of labels, without weights.
        weight: sum of weights. prediction, squared_error, absolute_error: weighted sums.
        covered: weight of rows whose label is not above the prediction.
        label_mean: weighted. label_m2: weighted sum of squared deviations from it.
    """

    rows: float
    non_finite: float
    positives: float
    weight: float
    prediction: float
    squared_error: float
    absolute_error: float
    covered: float
    label_mean: float
    label_m2: float


class Moments:
    """`TaskMoments` of all tasks, as one (T,) tensor a sum."""

    def __init__(self, tasks: Tasks) -> None:
        self.sums_T = {key: torch.zeros(len(tasks), dtype=torch.float64) for key in TaskMoments.__annotations__}

    def update(self, rows: Rows) -> None:
        """Adds B rows."""
        z_BT, y_BT, w_BT = rows.logit_BT, rows.label_BT, rows.weight_BT
        weight_T = w_BT.sum(0)
        # The mean is taken around one of the labels, so that constant labels have a variance of exactly 0.
        pivot_1T = y_BT.gather(0, rows.counts_BT.byte().argmax(0, keepdim=True))
        mean_T = (pivot_1T + (w_BT * (y_BT - pivot_1T)).sum(0, keepdim=True) / weight_T.clamp(min=_TINY)).squeeze(0)
        sums_T = {
            "rows": rows.counts_BT.sum(0),
            "non_finite": (~z_BT.isfinite()).sum(0),
            "positives": y_BT.sum(0),
            "weight": weight_T,
            "prediction": (w_BT * z_BT).sum(0),
            "squared_error": (w_BT * (z_BT - y_BT).square()).sum(0),
            "absolute_error": (w_BT * (z_BT - y_BT).abs()).sum(0),
            "covered": (w_BT * (y_BT <= z_BT)).sum(0),
            "label_mean": mean_T,
            "label_m2": (w_BT * (y_BT - mean_T).square()).sum(0),
        }
        self.sums_T = _merge(self.sums_T, {key: x_T.double() for key, x_T in sums_T.items()})

    def merge(self, other: Self) -> Self:
        """The moments of the rows of both."""
        both = type(self)(())
        both.sums_T = _merge(self.sums_T, other.sums_T)
        return both

    def state(self) -> dict[str, Tensor]:
        """One (T,) tensor a sum."""
        return dict(self.sums_T)

    def load(self, state: dict[str, Tensor]) -> None:
        """Replaces the sums."""
        self.sums_T = {key: state[key] for key in self.sums_T}

    def of_task(self, t: int) -> TaskMoments:
        """The moments of one task."""
        return TaskMoments(**{key: float(x_T[t]) for key, x_T in self.sums_T.items()})


def _merge(a_T: dict[str, Tensor], b_T: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds; means and squared deviations after Chan et al. 1983: differences of sums of squares would cancel."""
    sums_T = {key: a_T[key] + b_T[key] for key in a_T}
    share_T = b_T["weight"] / sums_T["weight"].clamp(min=_TINY)
    delta_T = b_T["label_mean"] - a_T["label_mean"]
    sums_T["label_mean"] = a_T["label_mean"] + delta_T * share_T
    sums_T["label_m2"] += delta_T.square() * a_T["weight"] * share_T
    return sums_T
