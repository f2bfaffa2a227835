"""FairGrad and Nash-MTL: every task gains its fair part of a step."""

# Shapes: T tasks, A of them with a gradient.

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import GRADIENT_REFUSALS, Weighted
from pipeline.training.optim.weighting.solved import SolvedLoss

RIDGE = 1e-6  # added to the squared norm of each gradient, relative to it
PRECISION, STEPS, HALVINGS = 1e-24, 200, 60


class FairGrad(Weighted):
    """As fixed, but the shared part descends so that the tasks' gains are alpha-fair (FairGradLoss).

    When: no task may be left behind, whatever the scale of its gradient; a backward more per task.

    Attributes:
        alpha: of fairness: 1 is proportional fairness, which is nash_mtl; the larger, the more the least gain counts. Beyond
            these limits rounding hides the solution where gradients differ in length by orders of magnitude.
    """

    name: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(1.0, ge=0.5, le=10)
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """FairGradLoss."""
        return FairGradLoss(loss_weights, self.alpha)


class NashMTL(Weighted):
    """As fixed, but the shared part descends along the Nash bargaining solution, G^T G a = 1 / a.

    It is FairGradLoss with alpha = 1 (Nash-MTL, Navon et al., ICML 2022). The direction does not depend on
    the scale of any loss, so loss weights only act on towers and tables.

    When: losses of very different scales whose tasks conflict; a backward more per task.
    """

    name: Literal["nash_mtl"] = "nash_mtl"
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """FairGradLoss."""
        return FairGradLoss(loss_weights, alpha=1.0)


class FairGradLoss(SolvedLoss):
    """d = sum_t w_t g_t with G^T G w = w^(-1/alpha), element by element (FairGrad, Ban & Ji, ICML 2024).

    With alpha = 1 it is Nash-MTL. The authors solve a least-squares problem, those of Nash-MTL a sequence of convex ones; here
    Newton steps find the only solution. Chosen here: products are divided by the mean squared norm, so that orthogonal
    gradients of one norm have w = 1, as in the plain sum; a ridge of 1e-6 of a gradient's squared norm, since gradients that
    cancel exactly have no solution; towers and tables keep the plain sum, where the authors weight the losses.

    Args:
        loss_weights: per task. alpha: see FairGrad.
    """

    def __init__(self, loss_weights: Sequence[float], alpha: float) -> None:
        super().__init__(loss_weights)
        self.alpha = alpha

    def shares(self, dot_AA: np.ndarray) -> np.ndarray:
        """w of the products over their mean square."""
        return fair(dot_AA / dot_AA.diagonal().mean(), self.alpha)


def fair(dot_TT: np.ndarray, alpha: float) -> np.ndarray:
    """w > 0 with G w = w^(-1/alpha), where G is dot_TT with the ridge.

    It is the minimum of the convex w^T G w / 2 - sum_t u(w_t) with u'(w) = w^(-1/alpha). With the norms n_t, C = G / (n n^T)
    and v = n w it reads C v = n^(1/alpha - 1) v^(-1/alpha), which does not suffer from norms that differ much.

    Args:
        dot_TT: products of gradients, none of them 0.
    """
    norm_T = np.sqrt(dot_TT.diagonal())
    angle_TT = dot_TT / np.outer(norm_T, norm_T) + RIDGE * np.eye(len(dot_TT))
    gain_T, power = norm_T ** (1 / alpha - 1), 1 / alpha

    def objective(v_T: np.ndarray) -> float:
        utility_T = np.log(v_T) if alpha == 1 else v_T ** (1 - power) / (1 - power)
        return v_T @ angle_TT @ v_T / 2 - gain_T @ utility_T

    v_T = gain_T ** (1 / (1 + power))  # the solution of orthogonal gradients
    for _ in range(STEPS):
        slope_T = angle_TT @ v_T - gain_T * v_T**-power
        move_T = -np.linalg.solve(angle_TT + np.diag(power * gain_T * v_T ** (-power - 1)), slope_T)
        decrement = -slope_T @ move_T
        if decrement <= PRECISION * (gain_T @ v_T ** (1 - power)):
            break
        size = min(1.0, 0.9 / max((-move_T / v_T).max(), 0.9))  # v stays positive
        here = objective(v_T)
        for _ in range(HALVINGS):
            if objective(v_T + size * move_T) <= here - size * decrement / 4 + np.finfo(float).eps * abs(here):
                break
            size /= 2
        v_T = v_T + size * move_T
    return v_T / norm_T
