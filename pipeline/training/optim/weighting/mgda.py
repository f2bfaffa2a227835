"""MGDA: the shortest convex combination of the tasks' gradients."""

# Shapes: T tasks, A of them with a gradient, or active.

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import GRADIENT_REFUSALS, Weighted
from pipeline.training.optim.weighting.solved import SolvedLoss

EPS = 1e-12  # of weights and products, relative to the largest


class MGDA(Weighted):
    """As fixed, but the shared part descends along the shortest convex combination of the tasks' gradients (MGDALoss).

    When: no task may become worse; it follows the task with the smallest gradient, so mind the losses' scales.
    """

    name: Literal["mgda"] = "mgda"
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """MGDALoss."""
        return MGDALoss(loss_weights)


class MGDALoss(SolvedLoss):
    """min |sum_t a_t g_t|^2 over a_t >= 0, sum_t a_t = 1 (Désidéri 2012; Sener & Koltun, NeurIPS 2018, eq. 3).

    Sener & Koltun solve it with Frank-Wolfe steps, here Wolfe's algorithm gives the exact point. Chosen here: the combination
    is multiplied by T, so that where all gradients are equal it is their plain sum, on the scale of towers and tables.
    """

    def shares(self, dot_AA: np.ndarray) -> np.ndarray:
        """The number of tasks times the weights of the shortest combination."""
        return len(dot_AA) * shortest(dot_AA)


def shortest(dot_TT: np.ndarray) -> np.ndarray:
    """The weights, >= 0 and of sum 1, of the shortest convex combination of vectors (Wolfe, Math. Programming 1976).

    A set of active vectors grows by the one that the combination most conflicts with, and shrinks by those whose weight
    would become negative.

    Args:
        dot_TT: their products.
    """
    dot_TT = dot_TT / max(dot_TT.diagonal().max(), np.finfo(float).tiny)
    weight_T = np.zeros(len(dot_TT))
    active = [int(dot_TT.diagonal().argmin())]
    weight_T[active] = 1
    square = float("inf")
    while True:
        slope_T = dot_TT @ weight_T
        entering = int(slope_T.argmin())
        # No vector shortens it any more, or only within rounding.
        if slope_T[entering] >= weight_T @ slope_T - EPS or weight_T @ slope_T >= square:
            return weight_T / weight_T.sum()
        square = float(weight_T @ slope_T)
        active = _descend(dot_TT, weight_T, [*(index for index in active if index != entering), entering])


def _descend(dot_TT: np.ndarray, weight_T: np.ndarray, active: list[int]) -> list[int]:
    """Moves the weights to the shortest affine combination of the active vectors; returns those left active."""
    while True:
        target_A, current_A = _affine(dot_TT[np.ix_(active, active)]), weight_T[active]
        negative_A = target_A <= EPS
        if not negative_A.any():
            weight_T[active] = target_A
            return active
        room_A = current_A[negative_A] / (current_A[negative_A] - target_A[negative_A]).clip(min=np.finfo(float).tiny)
        moved_A = current_A + min(1.0, room_A.min()) * (target_A - current_A)
        moved_A[np.flatnonzero(negative_A)[room_A.argmin()]] = 0
        weight_T[active] = moved_A.clip(min=0)
        active = [index for index, moved in zip(active, moved_A, strict=True) if moved > EPS]
        weight_T[[index for index in range(len(weight_T)) if index not in active]] = 0


def _affine(dot_AA: np.ndarray) -> np.ndarray:
    """The weights, of sum 1 and any sign, of the shortest affine combination."""
    size = len(dot_AA)
    system = np.ones((size + 1, size + 1))
    system[:size, :size], system[size, size] = dot_AA, 0
    target = np.zeros(size + 1)
    target[size] = 1
    return np.linalg.lstsq(system, target, rcond=None)[0][:size]  # vectors may be linearly dependent
