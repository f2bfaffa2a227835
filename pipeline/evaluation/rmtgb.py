"""Robust multi-task gradient boosting: trees that all tasks share, trees that outliers do not, and trees of each task's own."""

# Shapes: N rows, D columns, T tasks, K = 3 + T functions: shared, regular, outlier, and one a task.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from pipeline.evaluation.tree_grower import Binning, Floats, Tree, grow

SHARED, REGULAR, OUTLIER, OWN = range(4)  # places among the functions; a task's own is OWN + its place
THETA_DEVIATION = 0.1


@dataclass(frozen=True)
class TaskRows:
    """Rows with a label a task.

    Attributes:
        x_ND: inputs without NaN. label_NT: NaN where not observed. weight_N: 0 or more.
    """

    x_ND: NDArray[np.float32]
    label_NT: Floats
    weight_N: Floats


@dataclass(frozen=True)
class BoostingSettings:
    """How the trees are grown.

    Attributes:
        shared, partition, own: the most trees of the first, second (of each kind) and third block (of each task).
        patience: trees without a better loss of the validation rows after which the first and the third end; the second
            has its full length, since theta moves slowly at first, and is cut where that loss was lowest.
        theta_rate: of the gradient steps of theta. max_leaves, min_rows: of a tree, and of a leaf.
    """

    learning_rate: float = 0.05
    shared: int = 200
    partition: int = 200
    own: int = 1500
    patience: int = 30
    theta_rate: float = 10.0
    max_leaves: int = 31
    min_rows: int = 20


class RobustBoosting:
    """R-MTGB (Emami, Martínez-Muñoz, Hernández-Lobato 2025, arXiv 2507.11411); tasks may be observed on other rows each.

    With s_t = sigmoid(theta_t), a task's raw prediction is

        F_t(x) = base_t + shared(x) + (1 - s_t) regular(x) + s_t outlier(x) + own_t(x)

    Block 1 boosts `shared` on the rows of all tasks together. Block 2 adds a tree to `regular` and one to `outlier` at a time,
    both from the prediction before them and fitted to the tasks' residuals times 1 - s_t and s_t, and then moves each theta_t
    down its gradient. Block 3 boosts `own_t` on the task's rows.

    Taken from the abstract and the authors' code (GAA-UAM/R-MTGB; the paper's equations are not reachable here): the three
    blocks, the sum above, residuals scaled by the task's weight, leaves that are not divided by its square, the gradient of
    theta with the functions before the step, theta starting at N(0, 0.1).

    Chosen here:
    - In the paper a row has one task. Here a row counts once for each task that is observed on it, so that a shared
      tree needs a row's sums over tasks only: its time does not grow with tasks.
    - Leaves are Newton steps, since a gradient step of a log loss is four times or more too short: the authors' code
      fits a binary task's residuals without the second derivative.
    - A task starts at its base rate, its loss is that of its own kind, and regression is learnt standardised; the
      authors' code starts every task at 0, with one kind of loss.
    - theta's gradient is divided by the sum of the second derivatives, since the authors' sum over rows grows with the rows.
      Its rate of 10 parts the outlier of tests/pipeline/test_rmtgb.py from the others in 200 trees on every seed; 1 is late.
    - Trees of up to 31 leaves over binned columns instead of stumps over sorted ones, and blocks that end by early
      stopping on validation rows, as the separate trees do, instead of lengths from a grid search.

    Exchanging `regular` and `outlier` with -theta is the same model: the start decides which is which, and `outlier_weight_T`
    calls the smaller group outliers.

    Args:
        binary: per task whether it is binary (log loss, F is a logit) or regression (squared error).
        categorical: per column whether it holds ids below 255. seed: of theta's start.
    Attributes:
        theta_T: see above. trees: per function. mean_T, scale_T: of regression labels (0 and 1 for binary tasks).
    """

    def __init__(
        self,
        binary: Sequence[bool],
        categorical: Sequence[bool],
        settings: BoostingSettings | None = None,
        seed: int = 0,
    ) -> None:
        self.binary_T, self.categorical = np.array(binary), list(categorical)
        self.settings = settings or BoostingSettings()
        self.theta_T = np.random.default_rng(seed).normal(0, THETA_DEVIATION, len(binary))
        self.trees: list[list[Tree]] = [[] for _ in range(OWN + len(binary))]

    def fit(self, train: TaskRows, valid: TaskRows | None = None) -> "RobustBoosting":
        """Boosts the three blocks; without validation rows each to its full length.

        Args:
            train: every task is observed on some row of it, with weight.
        """
        s = self.settings
        observed_NT = ~np.isnan(train.label_NT) & (train.weight_N[:, None] > 0)
        self.mean_T, self.scale_T = _standardisation(train, self.binary_T)
        self.base_T = _base(train, self.binary_T)
        self.binning = Binning.fit(train.x_ND[observed_NT.any(1)], self.categorical)
        self.rows = Progress(self, train)
        self.held_out = Progress(self, valid) if valid is not None else None
        self.fitted = [np.flatnonzero(observed_NT.any(1))] * OWN + [np.flatnonzero(o_N) for o_N in observed_NT.T]
        shared_bin_ND = np.asfortranarray(self.rows.bin_ND[self.fitted[SHARED]])
        own = [np.asfortranarray(self.rows.bin_ND[rows]) for rows in self.fitted[OWN:]]
        self.bins = [shared_bin_ND] * OWN + own
        tasks = list(range(len(self.binary_T)))
        self._block([SHARED], tasks, s.shared, s.patience)
        self._block([REGULAR, OUTLIER], tasks, s.partition, s.partition)
        for task in tasks:
            self._block([OWN + task], [task], s.own, s.patience)
        del self.rows, self.held_out, self.fitted, self.bins
        return self

    def predict(self, x_ND: NDArray[np.float32]) -> Floats:
        """Logits of binary tasks and labels of regression, raw_NT."""
        bin_ND = self.binning.transform(x_ND)
        value_NK = np.stack([sum((t.predict(bin_ND) for t in trees), np.zeros(len(x_ND))) for trees in self.trees], 1)
        return combine(self.base_T, value_NK, self.theta_T) * self.scale_T + self.mean_T

    def outlier_weight_T(self) -> Floats:  # noqa: N802
        """Weight of the outliers' function per task, in (0, 1)."""
        weight_T = expit(self.theta_T)
        return weight_T if np.median(weight_T) <= 0.5 else 1 - weight_T

    def _block(self, functions: list[int], tasks: list[int], length: int, patience: int) -> None:
        """Adds trees to functions until the loss of the tasks on validation rows has not improved for `patience` steps."""
        best, waited = self._held_out_loss(tasks), 0
        kept = self._state()
        for _ in range(length):
            self.step(functions)
            loss = self._held_out_loss(tasks)
            if self.held_out is None or loss < best:
                best, waited, kept = loss, 0, self._state()
            else:
                waited += 1
                if waited >= patience:
                    break
        self._restore(kept)

    def step(self, functions: list[int]) -> None:
        """Adds a tree to each function, all from the prediction before them, and moves theta where they are of block 2."""
        s = self.settings
        raw_NT = combine(self.base_T, self.rows.value_NK, self.theta_T)
        gradient_NT, hessian_NT = derivatives(raw_NT, self.rows.label_NT, self.rows.weight_NT, self.binary_T)
        mix_KT = mixture(self.theta_T)
        theta_T = self.theta_T
        if OUTLIER in functions:
            theta_T = theta_T - s.theta_rate * theta_step(gradient_NT, hessian_NT, self.rows.value_NK, self.theta_T)
        for k in functions:
            gradient_N, hessian_N = gradient_NT @ mix_KT[k], hessian_NT @ (mix_KT[k] > 0)
            rows = self.fitted[k]
            tree = grow(
                self.bins[k], gradient_N[rows], hessian_N[rows], self.binning, learning_rate=s.learning_rate,
                max_leaves=s.max_leaves, min_rows=s.min_rows,
            )  # fmt: skip
            self.trees[k].append(tree)
            for progress in (self.rows, self.held_out):
                if progress is not None:
                    progress.value_NK[:, k] += tree.predict(progress.bin_ND)
        self.theta_T = theta_T

    def _held_out_loss(self, tasks: list[int]) -> float:
        """Mean over tasks of the loss on validation rows, relative to that of the base rate."""
        if self.held_out is None:
            return np.inf
        loss_T, base_T = (
            self.held_out.losses(raw_NT)[tasks]
            for raw_NT in (combine(self.base_T, self.held_out.value_NK, self.theta_T), self.base_T[None])
        )
        known_T = base_T > 0
        return float((loss_T[known_T] / base_T[known_T]).mean()) if known_T.any() else np.inf

    def _state(self) -> tuple[Floats, list[int], list[Floats]]:
        values = [p.value_NK.copy() for p in (self.rows, self.held_out) if p is not None]
        return self.theta_T, [len(trees) for trees in self.trees], values

    def _restore(self, state: tuple[Floats, list[int], list[Floats]]) -> None:
        self.theta_T, lengths, values = state
        self.trees = [trees[:length] for trees, length in zip(self.trees, lengths, strict=True)]
        for progress, value_NK in zip((self.rows, self.held_out), values, strict=False):
            if progress is not None:
                progress.value_NK = value_NK


class Progress:
    """Rows with the functions' values so far: bin_ND, label_NT (standardised, 0 where not observed), weight_NT, value_NK."""

    def __init__(self, model: RobustBoosting, rows: TaskRows) -> None:
        self.binary_T = model.binary_T
        self.bin_ND = model.binning.transform(rows.x_ND)
        self.weight_NT = np.where(np.isnan(rows.label_NT), 0.0, rows.weight_N[:, None])
        self.label_NT = np.nan_to_num((rows.label_NT - model.mean_T) / model.scale_T)
        self.value_NK = np.zeros((len(rows.x_ND), len(model.trees)))

    def losses(self, raw_NT: Floats) -> Floats:
        """Weighted mean loss per task, 0 for a task without rows."""
        loss_NT = np.where(
            self.binary_T, np.logaddexp(0, raw_NT) - self.label_NT * raw_NT, (raw_NT - self.label_NT) ** 2 / 2
        )
        return (loss_NT * self.weight_NT).sum(0) / np.maximum(self.weight_NT.sum(0), np.finfo(np.float64).tiny)


def mixture(theta_T: Floats) -> Floats:
    """mix_KT: the weight of each function in each task's prediction."""
    weight_T, tasks = expit(theta_T), len(theta_T)
    return np.vstack([np.ones(tasks), 1 - weight_T, weight_T, np.eye(tasks)])


def combine(base_T: Floats, value_NK: Floats, theta_T: Floats) -> Floats:
    """raw_NT: the sum of the class's docstring."""
    return base_T + value_NK @ mixture(theta_T)


def derivatives(
    raw_NT: Floats, label_NT: Floats, weight_NT: Floats, binary_T: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """gradient_NT and hessian_NT of log loss, or half the squared error, times the rows' weights."""
    probability_NT = expit(raw_NT)
    gradient_NT = np.where(binary_T, probability_NT, raw_NT) - label_NT
    hessian_NT = np.where(binary_T, probability_NT * (1 - probability_NT), 1.0)
    return gradient_NT * weight_NT, hessian_NT * weight_NT


def theta_step(gradient_NT: Floats, hessian_NT: Floats, value_NK: Floats, theta_T: Floats) -> Floats:
    """The loss's gradient with respect to theta_T, over the sum of the second derivatives by F."""
    weight_T = expit(theta_T)
    difference_N = value_NK[:, OUTLIER] - value_NK[:, REGULAR]
    return weight_T * (1 - weight_T) * (difference_N @ gradient_NT) / hessian_NT.sum(0)


def _standardisation(rows: TaskRows, binary_T: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    mean_T = _mean(rows, rows.label_NT)
    deviation_T = np.sqrt(_mean(rows, (rows.label_NT - mean_T) ** 2))
    return np.where(binary_T, 0.0, mean_T), np.where(binary_T | (deviation_T == 0), 1.0, deviation_T)


def _base(rows: TaskRows, binary_T: NDArray[np.bool_]) -> Floats:
    """Logit of the base rate of a binary task; standardised regression starts at 0."""
    rate_T = np.clip(_mean(rows, rows.label_NT), 1e-9, 1 - 1e-9)
    return np.where(binary_T, np.log(rate_T) - np.log1p(-rate_T), 0.0)


def _mean(rows: TaskRows, value_NT: Floats) -> Floats:
    weight_NT = np.where(np.isnan(value_NT), 0.0, rows.weight_N[:, None])
    return (np.nan_to_num(value_NT) * weight_NT).sum(0) / weight_NT.sum(0)
