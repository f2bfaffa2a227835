"""CAGrad: near the average gradient, the direction that helps the worst task most."""

# Shapes: T tasks, A of them with a gradient.

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import GRADIENT_REFUSALS, Weighted
from pipeline.training.optim.weighting.mgda import shortest
from pipeline.training.optim.weighting.solved import SolvedLoss

PRECISION, EVALUATIONS = 1e-10, 100
LEAST = 1e-6  # |g_w| relative to the longest gradient: below, its square is lost in the rounding of products


class CAGrad(Weighted):
    """As fixed, but the shared part descends where the worst task gains most, near the plain sum (CAGradLoss).

    When: tasks conflict and the mean loss has to go down too; a backward more per task.

    Attributes:
        c: radius around the average gradient, in its norms: 0 is the plain sum; the larger, the nearer to MGDA.
    """

    name: Literal["cagrad"] = "cagrad"
    c: float = Field(0.5, ge=0, lt=1)
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """CAGradLoss."""
        return CAGradLoss(loss_weights, self.c)


class CAGradLoss(SolvedLoss):
    """max_d min_t <g_t, d> with |d - g0| <= c |g0|, g0 the mean gradient (Liu et al., NeurIPS 2021, eq. 3).

    Its solution is d = g0 + c |g0| g_w / |g_w|, where g_w = sum_t w_t g_t and w >= 0 of sum 1 minimises
    <g_w, g0> + c |g0| |g_w| (eq. 4 and algorithm 1). Chosen here: T d in place of d, on the scale of the plain sum, and no
    division by 1 + c^2, which the authors' code offers. c = 0.5 is the default of LibMTL.

    Args:
        loss_weights: per task. c: see CAGrad.
    """

    def __init__(self, loss_weights: Sequence[float], c: float) -> None:
        super().__init__(loss_weights)
        self.c = c

    def shares(self, dot_AA: np.ndarray) -> np.ndarray:
        """1 + T w_t c |g0| / |g_w|, of the tasks with a gradient."""
        return conflict_averse(dot_AA, self.c)


def conflict_averse(dot_TT: np.ndarray, c: float) -> np.ndarray:
    """share_T of T d = sum_t share_t g_t.

    With s > 0, |g_w| = min_s (|g_w|^2 / s + s) / 2, and for one s the best w is that of the shortest combination of the
    g_t + (s / r) g0, where r = c |g0|. The function of s that is left is convex; its minimum is where s = |g_w|.

    Args:
        dot_TT: products of the gradients. c: radius.
    """
    tasks = len(dot_TT)
    mean_T = dot_TT.mean(1)  # <g_t, g0>
    square = mean_T.mean()
    radius = c * np.sqrt(max(square, 0.0))
    largest = np.sqrt(dot_TT.diagonal().max())
    if radius <= PRECISION * largest:
        return np.ones(tasks)

    def weights(s: float) -> np.ndarray:
        shift = s / radius
        return shortest(dot_TT + shift * (mean_T[:, None] + mean_T) + shift**2 * square)

    def excess(s: float) -> float:
        weight_T = weights(s)
        return s - np.sqrt(max(weight_T @ dot_TT @ weight_T, 0.0))

    s = _root(excess, LEAST * largest, largest)
    return 1 + tasks * weights(s) * radius / s


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function of low..high is 0, by the Illinois variant of regula falsi; low if it is positive there."""
    at_low, at_high = function(low), function(high)
    if at_low >= 0 or at_high <= 0:
        return low if at_low >= 0 else high
    for _ in range(EVALUATIONS):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        at_middle = function(middle)
        if at_middle * at_high < 0:
            low, at_low = high, at_high
        else:
            at_low /= 2
        high, at_high = middle, at_middle
        if abs(at_middle) <= PRECISION * middle or abs(high - low) <= PRECISION * abs(high):
            break
    return high
