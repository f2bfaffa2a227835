"""Metrics of regression tasks, in the label's unit (mse: squared); all means are weighted."""

import math

from pipeline.evaluation.metrics.moments import TaskMoments


def mse(of: TaskMoments) -> float | None:
    """Mean squared error."""
    return of.squared_error / of.weight if of.weight else None


def rmse(of: TaskMoments) -> float | None:
    """Root of `mse`."""
    return math.sqrt(of.squared_error / of.weight) if of.weight else None


def nrmse(of: TaskMoments) -> float | None:
    """`rmse` / standard deviation of the labels (population, weighted); 1 is no better than their mean."""
    return math.sqrt(of.squared_error / of.label_m2) if of.label_m2 else None


def r2(of: TaskMoments) -> float | None:
    """1 - nrmse²."""
    return 1 - of.squared_error / of.label_m2 if of.label_m2 else None


def label_mean(of: TaskMoments) -> float | None:
    """Mean label."""
    return of.label_mean if of.weight else None


def prediction_mean(of: TaskMoments) -> float | None:
    """Mean prediction."""
    return of.prediction / of.weight if of.weight else None


def mae(of: TaskMoments) -> float | None:
    """Mean absolute error, which huber and the median aim at."""
    return of.absolute_error / of.weight if of.weight else None


def coverage(of: TaskMoments) -> float | None:
    """Share of labels not above their prediction: q, for a task with loss quantile."""
    return of.covered / of.weight if of.weight and not of.non_finite else None


def calibration(of: TaskMoments) -> float | None:
    """Sum of predictions / sum of labels, both weighted: of revenue, what is predicted of each unit that comes in."""
    label = of.label_mean * of.weight
    return of.prediction / label if label else None
