"""Metrics of binary tasks that are functions of sums; elementwise over slices and buckets, NaN where undefined."""

import numpy as np

from pipeline.evaluation.metrics.sums import TaskSums


def base_rate(of: TaskSums) -> np.ndarray:
    """Weighted mean label."""
    return of.positive / (of.positive + of.negative)


def ne(of: TaskSums) -> np.ndarray:
    """Normalized Entropy: log loss over the entropy of the base rate (He et al. 2014, eq. 1); 1 is no better than it."""
    return of.loss / entropy(of.positive, of.negative)


def ne_train(of: TaskSums) -> np.ndarray:
    """Log loss over that of predicting the base rate of the train split: NE against what was known before these rows.

    It differs from `ne` by how far the base rate has moved, which a model could not know.
    """
    known = of.positive * -np.log(of.train_rate) + of.negative * -np.log1p(-of.train_rate)
    return of.loss / known


def log_loss(of: TaskSums) -> np.ndarray:
    """Nats per unit of weight."""
    return of.loss / (of.positive + of.negative)


def calibration(of: TaskSums) -> np.ndarray:
    """Sum of predictions / sum of labels, both weighted."""
    return np.where(of.non_finite > 0, np.nan, of.prediction) / np.where(of.positive > 0, of.positive, np.nan)


def entropy(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Log loss, in nats summed over the weight, of predicting the base rate: P ln(W/P) + N ln(W/N); NaN with one class."""
    one_class = (positive <= 0) | (negative <= 0)
    p, n = np.where(one_class, 1.0, positive), np.where(one_class, 1.0, negative)
    return np.where(one_class, np.nan, p * np.log1p(n / p) + n * np.log1p(p / n))
