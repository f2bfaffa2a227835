"""Area under the precision-recall curve, as average precision (Boyd et al. 2013): its base line is the base rate."""

# Shapes: G distinct predictions.

import torch

from pipeline.evaluation.metrics.prediction_table import PredictionTable


def pr_auc(table: PredictionTable) -> float | None:
    """Weighted mean over positives of the precision among all that rank at least as high; ties share one precision."""
    if not (table.finite and table.positive):
        return None
    positive_G, negative_G = (
        x_G.flip(0) for x_G in (table.positive_G, table.negative_G)
    )  # from the highest prediction
    above_G = positive_G.cumsum(0)
    precision_G = above_G / (above_G + negative_G.cumsum(0))
    # Predictions above all rows that count have no weight and no precision.
    return float(torch.where(positive_G > 0, positive_G * precision_G, 0.0).sum()) / table.positive
