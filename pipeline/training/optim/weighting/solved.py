"""Combinations of gradients that a solver finds from their products, in float64 on the CPU: T x T numbers a step."""

# Shapes: T tasks, A of them with a gradient.

import numpy as np
import torch
from torch import Tensor

from pipeline.training.optim.weighting.base import SharedGradientLoss


class SolvedLoss(SharedGradientLoss):
    """Gradients of the losses times their loss weights, combined with the shares that `shares` finds.

    A task that the batch does not observe has no gradient. It is left out: nothing could be gained for it, and a solver that
    seeks the gain of the worst task would do nothing for the others. The solvers are deterministic and their input is the
    same on every rank.
    """

    def shares(self, dot_AA: np.ndarray) -> np.ndarray:
        """How often each gradient counts, 1 in the plain sum; dot_AA: their products, symmetric, in float64, none of them 0."""
        raise NotImplementedError

    def solved(self, dot_TT: np.ndarray, weight_T: np.ndarray) -> np.ndarray:
        """`coefficients` in NumPy: the shares of the weighted gradients, times the loss weights."""
        own_TT, share_T = dot_TT * np.outer(weight_T, weight_T), np.ones(len(dot_TT))
        (seen_A,) = own_TT.diagonal().nonzero()
        if len(seen_A):
            share_T[seen_A] = self.shares(own_TT[np.ix_(seen_A, seen_A)])
        return share_T * weight_T

    def coefficients(self, dot_TT: Tensor, step: int) -> Tensor:  # noqa: ARG002
        """Those of `solved`; of the plain sum where a product is not finite, which the check of the step reports."""
        own_TT, weight_T = dot_TT.double().cpu().numpy(), self.weight_T.double().cpu().numpy()
        if not np.isfinite(own_TT).all():
            return self.weight_T
        return torch.from_numpy(self.solved((own_TT + own_TT.T) / 2, weight_T)).to(self.weight_T)
