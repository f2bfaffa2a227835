"""Combinations of gradients that a solver finds from their products, in float64 on the CPU: T x T numbers a step."""

# Shapes: T tasks.

import numpy as np
import torch
from torch import Tensor

from pipeline.training.optim.weighting.base import SharedGradientLoss


class SolvedLoss(SharedGradientLoss):
    """Gradients of the losses times their loss weights, combined with the shares that `shares` finds.

    The solvers are deterministic and their input is the same on every rank.
    """

    def shares(self, dot_TT: np.ndarray) -> np.ndarray:
        """How often each gradient counts, 1 in the plain sum; dot_TT: their products, symmetric, in float64."""
        raise NotImplementedError

    def coefficients(self, dot_TT: Tensor, step: int) -> Tensor:  # noqa: ARG002
        """The shares times the loss weights."""
        own_TT = (dot_TT * self.weight_T * self.weight_T.unsqueeze(1)).double().cpu().numpy()
        share_T = torch.from_numpy(self.shares((own_TT + own_TT.T) / 2))
        return share_T.to(self.weight_T) * self.weight_T
