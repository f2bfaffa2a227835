"""Running sums."""

# Shapes: N numbers along the last axis.

import numpy as np
import torch


def running(value_N: np.ndarray) -> np.ndarray:
    """Of each number the sum of those up to it, along the last axis: as np.cumsum, which takes several times as long."""
    return torch.from_numpy(value_N).cumsum(-1).numpy()


def running_down(value_N: np.ndarray) -> np.ndarray:
    """Of each number the sum of those from it on, along the last axis."""
    return torch.from_numpy(value_N).flip(-1).cumsum(-1).flip(-1).numpy()


def before(value_N: np.ndarray) -> np.ndarray:
    """Of each number the sum of those before it, and last the sum of all, (..., N + 1)."""
    sum_N = np.empty((*value_N.shape[:-1], value_N.shape[-1] + 1))
    sum_N[..., 0] = 0
    sum_N[..., 1:] = running(value_N)
    return sum_N
