"""Metrics of regression tasks, in the label's unit (mse: squared); all means are weighted, NaN where undefined.

Elementwise over slices and buckets.
"""

import numpy as np

from pipeline.evaluation.metrics.sums import TaskSums


def mse(of: TaskSums) -> np.ndarray:
    """Mean squared error."""
    return of.loss / of.weight


def rmse(of: TaskSums) -> np.ndarray:
    """Root of `mse`."""
    return np.sqrt(mse(of))


def nrmse(of: TaskSums) -> np.ndarray:
    """`rmse` / standard deviation of the labels (population, weighted); 1 is no better than their mean."""
    return np.sqrt(of.loss / _label_squares(of))


def r2(of: TaskSums) -> np.ndarray:
    """1 - nrmse²."""
    return 1 - of.loss / _label_squares(of)


def label_mean(of: TaskSums) -> np.ndarray:
    """Mean label."""
    return of.pivot + of.label / of.weight


def prediction_mean(of: TaskSums) -> np.ndarray:
    """Mean prediction."""
    return of.prediction / of.weight


def mae(of: TaskSums) -> np.ndarray:
    """Mean absolute error, which huber and the median aim at."""
    return of.absolute_error / of.weight


def coverage(of: TaskSums) -> np.ndarray:
    """Share of labels not above their prediction: q, for a task with loss quantile."""
    return np.where(of.non_finite > 0, np.nan, of.covered) / of.weight


def calibration(of: TaskSums) -> np.ndarray:
    """Sum of predictions / sum of labels, both weighted: of revenue, what is predicted of each unit that comes in."""
    label = label_mean(of) * of.weight
    return of.prediction / np.where(label == 0, np.nan, label)


def _label_squares(of: TaskSums) -> np.ndarray:
    """Weighted sum of squared deviations of the labels from their mean; NaN where they are constant."""
    squares = of.label_square - of.label**2 / of.weight
    # What is left of a constant once rounded is no variance.
    return np.where((squares > 1e-13 * of.label_square) & (of.rows > 1), squares, np.nan)
