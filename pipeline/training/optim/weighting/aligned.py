"""Aligned-MTL: gradients made orthogonal and equally long before they are summed."""

# Shapes: T tasks.

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from models.losses import TaskLoss
from pipeline.training.optim.weighting.base import GRADIENT_REFUSALS, Weighted
from pipeline.training.optim.weighting.solved import SolvedLoss


class Aligned(Weighted):
    """As fixed, but on aligned gradients: orthogonal, and as long as the smallest principal component (AlignedLoss).

    When: conflicts and dominating tasks at once, with loss weights that keep their meaning; a backward more per task.
    """

    name: Literal["aligned"] = "aligned"
    refuses: ClassVar = GRADIENT_REFUSALS

    def build(self, kinds: Sequence[str], loss_weights: Sequence[float], seed: int) -> TaskLoss:  # noqa: ARG002
        """AlignedLoss."""
        return AlignedLoss(loss_weights)


class AlignedLoss(SolvedLoss):
    """d = G B w with B = sqrt(lambda_min) V Lambda^(-1/2) V^T (Aligned-MTL, Senushkin et al., CVPR 2023).

    V Lambda V^T are the eigenvectors and eigenvalues of G^T G, lambda_min the least of those that are not numerically 0 (the
    authors' bound: the largest times T times the precision of float32), w the loss weights, which weigh the aligned
    gradients: so they count, where scaling the gradients before would not.
    """

    def solved(self, dot_TT: np.ndarray, weight_T: np.ndarray) -> np.ndarray:
        """B w."""
        return balance(dot_TT) @ weight_T


def balance(dot_TT: np.ndarray) -> np.ndarray:
    """B, as T x T; of gradients that are all 0, 0."""
    square_T, vector_TT = np.linalg.eigh(dot_TT)
    kept_T = square_T > square_T.max() * len(square_T) * np.finfo(np.float32).eps
    if not kept_T.any():
        return np.zeros_like(dot_TT)
    square_T, vector_TT = square_T[kept_T], vector_TT[:, kept_T]
    return np.sqrt(square_T.min()) * (vector_TT / np.sqrt(square_T)) @ vector_TT.T
