"""Metrics of binary tasks, from the table of their distinct predictions."""

# Shapes: G distinct predictions.

import math

import numpy as np

from pipeline.evaluation.metrics.prediction_table import PredictionTable

ECE_BINS = 20


def base_rate(table: PredictionTable) -> float | None:
    """Weighted mean label."""
    return table.positive / table.weight if table.weight else None


def ne(table: PredictionTable) -> float | None:
    """Normalized Entropy: log loss over the entropy of the base rate (He et al. 2014, eq. 1); 1 is no better than it."""
    if not (table.finite and table.positive and table.negative):
        return None
    return table.loss / entropy(table.positive, table.negative)


def log_loss(table: PredictionTable) -> float | None:
    """Nats per unit of weight."""
    return table.loss / table.weight if table.finite else None


def auc(table: PredictionTable) -> float | None:
    """Probability that a positive outranks a negative, a tie counted half; not binned."""
    if not (table.finite and table.positive and table.negative):
        return None
    below_G = table.negative_G.cumsum(0) - table.negative_G / 2
    return float(table.positive_G / table.positive @ below_G / table.negative)


def calibration(table: PredictionTable) -> float | None:
    """Sum of predictions / sum of labels, both weighted."""
    return float(table.predicted_G.sum()) / table.positive if table.finite and table.positive else None


def ece(table: PredictionTable) -> float | None:
    """Expected calibration error (Naeini et al. 2015) over 20 bins of equal weight.

    Bins of equal width would hold nearly all rows of a rare label in the first. Equal predictions that straddle an edge are
    divided in proportion, so the order of rows cannot matter. Biased upwards on few rows, like every binned ECE.
    """
    if not table.finite:
        return None
    # The excess of predictions over labels, a function of the weight below, is cut at equal distances. It is linear between
    # predictions, so rounding cannot move a prediction from bin to bin.
    excess_G = table.predicted_G - table.positive_G
    weight, excess = (
        np.concatenate(([0.0], x_G.cumsum(0).numpy())) for x_G in (table.positive_G + table.negative_G, excess_G)
    )
    at_edge = np.interp(np.linspace(0.0, weight[-1], ECE_BINS + 1), weight, excess)
    return float(np.abs(np.diff(at_edge)).sum() / weight[-1])


def entropy(positive: float, negative: float) -> float:
    """Log loss, in nats summed over the weight, of predicting the base rate: P ln(W/P) + N ln(W/N)."""
    return positive * math.log1p(negative / positive) + negative * math.log1p(positive / negative)
