"""Sums over the rows of each slice and bucket: what metrics that are functions of sums are computed from."""

# Shapes: B rows, T tasks, D dimensions, S slices, K buckets, C sums of a task, X = T·C columns.

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from typing_extensions import Self

from pipeline.evaluation.metrics.base import Figure, Grouping, Rows, Tasks, bucket_of

NAMES = (
    "rows", "non_finite", "positives", "weight", "positive", "negative", "prediction", "loss", "absolute_error", "covered",
    "label", "label_square",
)  # fmt: skip
COLUMN = {name: c for c, name in enumerate(NAMES)}
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
        self.sum_SKX = np.zeros((grouping.count, grouping.buckets, len(self.tasks) * len(NAMES)))
        self.pivot_T = np.full(len(self.tasks), np.nan)  # until a label has been seen
        self.pending: list[tuple[np.ndarray, np.ndarray]] = []  # cells of the rows, and what they add

    def update(self, rows: Rows) -> None:
        """Adds B rows."""
        self._choose_pivots(rows)
        slices, buckets = self.sum_SKX.shape[:2]
        starts_D = np.array(self.grouping.starts, np.int64)
        cell_BD = np.zeros((len(rows.cluster_B), 1 + len(starts_D)), np.int32)
        cell_BD[:, 1:] = np.where(rows.slice_BD >= 0, rows.slice_BD + starts_D, slices)
        cell_BD = cell_BD * buckets + bucket_of(rows.cluster_B, buckets)[:, None]
        self.pending.append((cell_BD, self._columns(rows).numpy()))
        if sum(len(cells) for cells, _ in self.pending) >= PENDING_ROWS:
            self._add_pending()

    def _add_pending(self) -> np.ndarray:
        """The sums, after adding what is pending to them."""
        if self.pending:
            cell_BD, column_BX = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
            cells, ends = self.sum_SKX[..., 0].size, np.arange(len(cell_BD) + 1) * cell_BD.shape[1]
            # A row adds to one cell a dimension: the transpose of a sparse matrix of ones. The last cells are of no slice.
            shape = (len(cell_BD), cells + self.grouping.buckets)
            members_BC = csr_matrix((np.ones(cell_BD.size), cell_BD.ravel(), ends), shape=shape)
            added = np.asarray(members_BC.T @ column_BX)
            self.sum_SKX = self.sum_SKX + added[:cells].reshape(self.sum_SKX.shape)
            self.pending = []
        return self.sum_SKX

    def _choose_pivots(self, rows: Rows) -> None:
        """Of each task the mean of its first rows, taken around one of them: exactly the label, where it is constant."""
        seen_T = rows.counts_BT.any(0).numpy()
        for t in np.flatnonzero(np.isnan(self.pivot_T) & seen_T & ~self.binary_T.numpy()):
            y_B, w_B = rows.label_BT[:, t][rows.counts_BT[:, t]], rows.weight_BT[:, t][rows.counts_BT[:, t]]
            self.pivot_T[t] = float(y_B[0] + (w_B * (y_B - y_B[0])).sum() / w_B.sum())

    def _columns(self, rows: Rows) -> Tensor:
        """What each row adds, (B, T·C)."""
        column_BTC = rows.logit_BT.new_zeros(*rows.logit_BT.shape, len(NAMES))
        for kind, tasks in (("binary", self.binary_T), ("regression", ~self.binary_T)):
            if not tasks.any():
                continue
            which = slice(None) if tasks.all() else tasks
            z_BT, y_BT, w_BT, counts_BT = (
                x[:, which] for x in (rows.logit_BT, rows.label_BT, rows.weight_BT, rows.counts_BT)
            )
            added = {"rows": counts_BT, "non_finite": ~z_BT.isfinite(), "positives": y_BT, "weight": w_BT}
            if kind == "binary":
                added |= _of_classes(z_BT, y_BT, w_BT)
            else:
                added |= _of_errors(z_BT, y_BT, w_BT, torch.from_numpy(np.nan_to_num(self.pivot_T))[which])
            for name, x_BT in added.items():
                column_BTC[:, which, COLUMN[name]] = torch.where(counts_BT, x_BT, 0.0).double()
        return column_BTC.reshape(len(rows.logit_BT), -1)

    def merge(self, other: Self) -> Self:
        """The sums of the rows of both."""
        both = type(self)(self.tasks, self.grouping)
        both.pivot_T = np.where(np.isnan(self.pivot_T), other.pivot_T, self.pivot_T)
        both.sum_SKX = self._around(both.pivot_T) + other._around(both.pivot_T)
        return both

    def _around(self, pivot_T: np.ndarray) -> np.ndarray:
        """The sums with those of y - pivot around other pivots."""
        sum_SKTC = self._add_pending().reshape(*self.sum_SKX.shape[:2], len(self.tasks), len(NAMES)).copy()
        shift_T = np.nan_to_num(self.pivot_T - pivot_T)
        weight, label = sum_SKTC[..., COLUMN["weight"]], sum_SKTC[..., COLUMN["label"]]
        moved_SKT = sum_SKTC[..., COLUMN["label_square"]] + 2 * shift_T * label + shift_T**2 * weight
        sum_SKTC[..., COLUMN["label"]] = label + shift_T * weight
        sum_SKTC[..., COLUMN["label_square"]] = moved_SKT
        return sum_SKTC.reshape(self.sum_SKX.shape)

    def state(self) -> dict[str, np.ndarray]:
        """The sums and the pivots."""
        return {"sums": self._add_pending(), "pivots": self.pivot_T.copy()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Replaces the sums."""
        self.sum_SKX, self.pivot_T = state["sums"], state["pivots"].copy()

    def of_task(self, t: int) -> BucketSums:
        """The sums of one task."""
        first = t * len(NAMES)
        sum_SKC = self._add_pending()[..., first : first + len(NAMES)]
        rate = self.grouping.train_rates.get(self.tasks[t][0], np.nan)

        def of(sum_C: np.ndarray) -> TaskSums:
            return TaskSums(
                **{name: sum_C[..., c] for name, c in COLUMN.items()}, pivot=float(self.pivot_T[t]), train_rate=rate
            )

        if self.grouping.buckets == 1:
            return BucketSums(of(sum_SKC.sum(1)), None)
        # The others' sums are added up, not subtracted from all: what is 0 without a bucket is exactly 0.
        below_SKC, above_SKC = np.cumsum(sum_SKC, 1), np.cumsum(sum_SKC[:, ::-1], 1)[:, ::-1]
        left_SKC = np.zeros_like(sum_SKC)
        left_SKC[:, 1:] += below_SKC[:, :-1]
        left_SKC[:, :-1] += above_SKC[:, 1:]
        left_SKC[sum_SKC[..., COLUMN["rows"]] == 0] = np.nan
        return BucketSums(of(below_SKC[:, -1]), of(left_SKC))


def of_sums(formula: Callable[[TaskSums], np.ndarray]) -> Callable[[BucketSums], Figure]:
    """A metric that is a formula of sums, elementwise over slices and buckets."""

    def compute(of: BucketSums) -> Figure:
        with np.errstate(divide="ignore", invalid="ignore"):
            return Figure(formula(of.whole), None if of.left_out is None else formula(of.left_out))

    return compute


def _of_classes(z_BT: Tensor, y_BT: Tensor, w_BT: Tensor) -> dict[str, Tensor]:
    """What a row of binary tasks adds."""
    # Log loss by its exact form: torch's softplus is linear above 20, an error of 2e-9.
    small_BT = (-z_BT.abs()).exp()
    loss_BT = z_BT.clamp(min=0) - y_BT * z_BT + small_BT.log1p()
    probability_BT = torch.where(z_BT >= 0, 1.0, small_BT) / (1 + small_BT)
    positive_BT = w_BT * y_BT
    negative_BT = w_BT * (1 - y_BT)
    loss_BT = torch.where(z_BT.isfinite(), w_BT * loss_BT, torch.nan)
    return {"positive": positive_BT, "negative": negative_BT, "prediction": w_BT * probability_BT, "loss": loss_BT}


def _of_errors(z_BT: Tensor, y_BT: Tensor, w_BT: Tensor, pivot_T: Tensor) -> dict[str, Tensor]:
    """What a row of regression tasks adds."""
    error_BT, centred_BT = z_BT - y_BT, y_BT - pivot_T
    return {
        "prediction": w_BT * z_BT,
        "loss": w_BT * error_BT.square(),
        "absolute_error": w_BT * error_BT.abs(),
        "covered": w_BT * (y_BT <= z_BT),
        "label": w_BT * centred_BT,
        "label_square": w_BT * centred_BT.square(),
    }
