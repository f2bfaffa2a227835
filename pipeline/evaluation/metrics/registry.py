"""Every metric, in the order of eval.jsonl. A new one is a function in a file of this folder and a line here."""

from collections.abc import Callable

import numpy as np

from pipeline.evaluation.metrics import binary, ranking, regression
from pipeline.evaluation.metrics.base import Figure, Metric
from pipeline.evaluation.metrics.kept_rows import KeptRows, TaskRows
from pipeline.evaluation.metrics.ranking import RankedRows
from pipeline.evaluation.metrics.sums import Sums, of_sums
from pipeline.run.headline import HEADLINE, RANKING


def ranked(name: str, metric: Callable[[RankedRows], tuple[float, np.ndarray]]) -> Callable[[TaskRows], Figure]:
    """A ranking metric of all rows and of every slice."""
    return lambda rows: rows.figure(name, metric)


def within_groups(name: str) -> Callable[[TaskRows], Figure]:
    """A metric of the order within groups, of the whole split."""
    return lambda rows: rows.whole_only(*rows.in_groups[name])


_ALL = [
    *(
        metric
        for kind in ("binary", "regression")
        for metric in (
            # Rows that count: observed, of weight above 0.
            Metric("rows", kind, Sums, of_sums(lambda of: of.rows)),
            Metric("weight_sum", kind, Sums, of_sums(lambda of: of.weight)),
            # Rows whose prediction is NaN or infinite: from the first on, what depends on predictions is undefined.
            Metric("non_finite", kind, Sums, of_sums(lambda of: of.non_finite)),
        )
    ),
    Metric("positives", "binary", Sums, of_sums(lambda of: of.positives)),  # sum of labels, without weights
    Metric("base_rate", "binary", Sums, of_sums(binary.base_rate)),
    Metric("ne", "binary", Sums, of_sums(binary.ne), higher_is_better=False, label="NE"),
    Metric("ne_train", "binary", Sums, of_sums(binary.ne_train), higher_is_better=False, label="NE (train base rate)"),
    Metric("log_loss", "binary", Sums, of_sums(binary.log_loss), higher_is_better=False, label="log loss"),
    Metric("auc", "binary", KeptRows, ranked("auc", ranking.auc), higher_is_better=True, label="AUC"),
    Metric("calibration", "binary", Sums, of_sums(binary.calibration), label="calib"),
    Metric("ece", "binary", KeptRows, ranked("ece", ranking.ece), higher_is_better=False, label="ECE"),
    Metric("pr_auc", "binary", KeptRows, ranked("pr_auc", ranking.pr_auc), higher_is_better=True, label="PR-AUC"),
    Metric("gauc", "binary", KeptRows, within_groups("gauc"), higher_is_better=True, label="grouped AUC"),
    Metric("ndcg", "binary", KeptRows, within_groups("ndcg"), higher_is_better=True, label="NDCG"),
    Metric("mse", "regression", Sums, of_sums(regression.mse), higher_is_better=False, label="MSE"),
    Metric("rmse", "regression", Sums, of_sums(regression.rmse), higher_is_better=False, label="RMSE"),
    Metric("nrmse", "regression", Sums, of_sums(regression.nrmse), higher_is_better=False, label="NRMSE"),
    Metric("r2", "regression", Sums, of_sums(regression.r2), higher_is_better=True, label="R2"),
    Metric("mae", "regression", Sums, of_sums(regression.mae), higher_is_better=False, label="MAE"),
    Metric("coverage", "regression", Sums, of_sums(regression.coverage), label="coverage"),
    Metric("calibration", "regression", Sums, of_sums(regression.calibration), label="calib"),
    Metric(
        "xauc",
        "regression",
        KeptRows,
        lambda rows: rows.whole_only(*rows.in_order),
        higher_is_better=True,
        label="XAUC",
    ),
    Metric("label_mean", "regression", Sums, of_sums(regression.label_mean)),
    Metric("prediction_mean", "regression", Sums, of_sums(regression.prediction_mean)),
]
COUNTS = ("rows", "non_finite")  # whole numbers
TOTALS = (*COUNTS, "weight_sum", "positives")  # have no intervals
WHOLE_ONLY = ("gauc", "ndcg", "xauc")  # undefined in slices
# Kind of task → name → metric.
METRICS = {kind: {m.name: m for m in _ALL if m.kind == kind} for kind in ("binary", "regression")}
# Kind of task → names of the metrics that the report's table shows.
COLUMNS = {
    "binary": (HEADLINE["binary"], RANKING["binary"], "calibration"),
    "regression": (HEADLINE["regression"], RANKING["regression"]),
}
