"""Sums over the rows of each slice and bucket: what metrics that are functions of sums are computed from."""

# Shapes: B rows, T tasks, D dimensions, S slices, K buckets, C sums of a task, X of all tasks.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from typing_extensions import Self

from pipeline.evaluation.metrics.base import Figure, Grouping, Rows, Tasks, bucket_of
from pipeline.evaluation.metrics.intervals import left_out

# What a row of each kind of task adds.
NAMES = {
    "binary": ("rows", "non_finite", "positives", "prediction", "loss", "positive", "negative"),
    "regression": (
        "rows", "non_finite", "positives", "prediction", "loss", "weight", "absolute_error", "covered", "label", "label_square",
    ),
}  # fmt: skip
PENDING_ROWS = 1 << 17  # that are added together, since the sums are as many as several batches


@dataclass(frozen=True)
class TaskSums:
    """Sums of one task; each attribute is an array of the same shape, (S,) or (S, K).

    Attributes:
        rows: that count. non_finite: those whose prediction is NaN or infinite. positives: labels, without weights.
        weight: of the rows. positive, negative: of each class (a soft label y is y of one and 1 - y of the other).
        prediction: weighted, of probabilities or a regression's predictions.
        loss: weighted, log loss in nats; of a regression the squared error. absolute_error, covered (weight of labels that are
            not above their prediction), label and label_square (of y - pivot): of regressions.
        pivot: a number near the labels, so that differences of squares do not cancel.
        train_rate: of a binary task, NaN where it is not known.
    """

    rows: np.ndarray
    non_finite: np.ndarray
    positives: np.ndarray
    weight: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    prediction: np.ndarray
    loss: np.ndarray
    absolute_error: np.ndarray
    covered: np.ndarray
    label: np.ndarray
    label_square: np.ndarray
    pivot: float
    train_rate: float


@dataclass(frozen=True)
class BucketSums:
    """The sums of one task in all slices, and without each bucket."""

    whole: TaskSums
    left_out: TaskSums | None


class Sums:
    """`BucketSums` of all tasks."""

    def __init__(self, tasks: Tasks, grouping: Grouping) -> None:
        self.tasks, self.grouping = tuple(tasks), grouping
        self.binary_T = torch.tensor([kind == "binary" for _, kind in tasks], dtype=torch.bool)
        widths = [len(NAMES[kind]) for _, kind in self.tasks]
        self.first_T = np.cumsum(widths, dtype=np.int64) - widths
        self.sum_SKX = np.zeros((grouping.count, grouping.buckets, sum(widths)))
        self.pivot_T = np.full(len(self.tasks), np.nan)  # until a label has been seen
        self.pending: list[tuple[np.ndarray, ...]] = []  # cells of rows, how many a row has, and what it adds

    def update(self, rows: Rows) -> None:
        """Adds B rows."""
        self._choose_pivots(rows)
        buckets = self.grouping.buckets
        starts_D = np.array(self.grouping.starts, np.int32) * buckets
        cell_BD = np.zeros((len(rows.cluster_B), 1 + len(starts_D)), np.int32)
        np.multiply(rows.slice_BD, buckets, out=cell_BD[:, 1:], dtype=np.int32)
        cell_BD[:, 1:] += starts_D
        cell_BD += bucket_of(rows.cluster_B, buckets).astype(np.int32)[:, None]
        in_slice_BD = np.ones(cell_BD.shape, bool)
        np.greater_equal(rows.slice_BD, 0, out=in_slice_BD[:, 1:])
        self.pending.append((cell_BD[in_slice_BD], in_slice_BD.sum(1, dtype=np.int32), self._columns(rows).numpy()))
        if sum(len(counts) for _, counts, _ in self.pending) >= PENDING_ROWS:
            self._add_pending()

    def _add_pending(self) -> np.ndarray:
        """The sums, after adding what is pending to them."""
        if self.pending:
            cells, count_B, column_BX = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
            # A row adds to one cell a slice that it is in: the transpose of a sparse matrix of ones.
            ends, shape = np.concatenate(([0], np.cumsum(count_B))), (len(count_B), self.sum_SKX[..., 0].size)
            members_BC = csr_matrix((np.ones(len(cells)), cells, ends), shape=shape)
            self.sum_SKX = self.sum_SKX + np.asarray(members_BC.T @ column_BX).reshape(self.sum_SKX.shape)
            self.pending = []
        return self.sum_SKX

    def _choose_pivots(self, rows: Rows) -> None:
        """Of each task the mean of its first rows, taken around one of them: exactly the label, where it is constant."""
        seen_T = rows.counts_BT.any(0).numpy()
        for t in np.flatnonzero(np.isnan(self.pivot_T) & seen_T & ~self.binary_T.numpy()):
            y_B, w_B = rows.label_BT[:, t][rows.counts_BT[:, t]], rows.weight_BT[:, t][rows.counts_BT[:, t]]
            self.pivot_T[t] = float(y_B[0] + (w_B * (y_B - y_B[0])).sum() / w_B.sum())

    def _columns(self, rows: Rows) -> Tensor:
        """What each row adds, (B, X)."""
        column_XB = rows.logit_BT.new_empty(self.sum_SKX.shape[-1], len(rows.logit_BT))
        for t, (_, kind) in enumerate(self.tasks):
            z_B, y_B, w_B, counts_B = (
                x[:, t].contiguous() for x in (rows.logit_BT, rows.label_BT, rows.weight_BT, rows.counts_BT)
            )
            added = {"rows": counts_B, "non_finite": ~z_B.isfinite(), "positives": y_B}
            added |= (
                _of_classes(z_B, y_B, w_B) if kind == "binary" else _of_errors(z_B, y_B, w_B, float(self.pivot_T[t]))
            )
            for place, name in enumerate(NAMES[kind], int(self.first_T[t])):
                column_XB[place] = added[name]
        return column_XB.T.contiguous()

    def merge(self, other: Self) -> Self:
        """The sums of the rows of both."""
        both = type(self)(self.tasks, self.grouping)
        both.pivot_T = np.where(np.isnan(self.pivot_T), other.pivot_T, self.pivot_T)
        with np.errstate(invalid="ignore"):  # infinite predictions of both signs
            both.sum_SKX = self._around(both.pivot_T) + other._around(both.pivot_T)
        return both

    def _around(self, pivot_T: np.ndarray) -> np.ndarray:
        """The sums with those of y - pivot around other pivots."""
        sum_SKX = self._add_pending().copy()
        for t in np.flatnonzero(~np.isnan(self.pivot_T) & (self.pivot_T != pivot_T)):
            shift = self.pivot_T[t] - pivot_T[t]
            place = {name: self.first_T[t] + c for c, name in enumerate(NAMES["regression"])}
            weight_SK, label_SK = sum_SKX[..., place["weight"]], sum_SKX[..., place["label"]].copy()
            sum_SKX[..., place["label"]] += shift * weight_SK
            sum_SKX[..., place["label_square"]] += 2 * shift * label_SK + shift**2 * weight_SK
        return sum_SKX

    def state(self) -> dict[str, np.ndarray]:
        """The sums and the pivots."""
        return {"sums": self._add_pending(), "pivots": self.pivot_T.copy()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Replaces the sums."""
        self.sum_SKX, self.pivot_T, self.pending = state["sums"], state["pivots"].copy(), []

    def of_task(self, t: int) -> BucketSums:
        """The sums of one task."""
        name, kind = self.tasks[t]
        column = {name: c for c, name in enumerate(NAMES[kind])}
        first = self.first_T[t]
        sum_SKC = self._add_pending()[..., first : first + len(column)]
        rate = self.grouping.train_rates.get(name, np.nan)

        def of(sum_C: np.ndarray) -> TaskSums:
            sums: dict[str, Any] = dict.fromkeys(TaskSums.__annotations__, np.zeros(()))
            sums |= {name: sum_C[..., c] for name, c in column.items()}
            if kind == "binary":
                sums["weight"] = sums["positive"] + sums["negative"]
            return TaskSums(**{**sums, "pivot": float(self.pivot_T[t]), "train_rate": rate})

        if self.grouping.buckets == 1:
            return BucketSums(of(sum_SKC.sum(1)), None)
        # The others' sums are added up, not subtracted from all: what is 0 without a bucket is exactly 0.
        below_SKC, above_SKC = np.cumsum(sum_SKC, 1), np.cumsum(sum_SKC[:, ::-1], 1)[:, ::-1]
        left_SKC = np.zeros_like(sum_SKC)
        left_SKC[:, 1:] += below_SKC[:, :-1]
        left_SKC[:, :-1] += above_SKC[:, 1:]
        left_SKC[sum_SKC[..., column["rows"]] == 0] = np.nan
        return BucketSums(of(below_SKC[:, -1]), of(left_SKC))


def of_sums(formula: Callable[[TaskSums], np.ndarray]) -> Callable[[BucketSums], Figure]:
    """A metric that is a formula of sums, elementwise over slices and buckets."""

    def compute(of: BucketSums) -> Figure:
        with np.errstate(divide="ignore", invalid="ignore"):
            if of.left_out is None:
                return Figure(formula(of.whole))
            return Figure(formula(of.whole), left_out(formula(of.left_out), ~np.isnan(of.left_out.rows)))

    return compute


def _of_classes(z_B: Tensor, y_B: Tensor, w_B: Tensor) -> dict[str, Tensor]:
    """What a row of a binary task adds; 0 where its weight is."""
    # Log loss by its exact form: torch's softplus is linear above 20, an error of 2e-9.
    small_B = z_B.abs().neg_().exp_()
    loss_B = z_B.clamp(min=0) - y_B * z_B + small_B.log1p()
    probability_B = torch.where(z_B >= 0, 1.0, small_B) / (1 + small_B)
    positive_B = w_B * y_B
    loss_B = torch.where(z_B.isfinite(), w_B * loss_B, torch.nan)
    return {"positive": positive_B, "negative": w_B * (1 - y_B), "prediction": w_B * probability_B, "loss": loss_B}


def _of_errors(z_B: Tensor, y_B: Tensor, w_B: Tensor, pivot: float) -> dict[str, Tensor]:
    """What a row of a regression task adds; 0 where its weight is."""
    error_B, centred_B = z_B - y_B, y_B - (0.0 if np.isnan(pivot) else pivot)
    return {
        "weight": w_B,
        "prediction": w_B * z_B,
        "loss": w_B * error_B.square(),
        "absolute_error": w_B * error_B.abs(),
        "covered": w_B * (y_B <= z_B),
        "label": w_B * centred_B,
        "label_square": w_B * centred_B.square(),
    }
