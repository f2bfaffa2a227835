"""Every metric, in the order of eval.jsonl. A new one is a function in a file of this folder and a line here."""

from pipeline.evaluation.metrics import binary, regression
from pipeline.evaluation.metrics.base import Metric
from pipeline.evaluation.metrics.moments import Moments
from pipeline.evaluation.metrics.pr_auc import pr_auc
from pipeline.evaluation.metrics.prediction_table import PredictionTables
from pipeline.run.headline import HEADLINE, RANKING

_ALL = [
    *(
        metric
        for kind in ("binary", "regression")
        for metric in (
            # Rows that count: observed, of weight above 0.
            Metric("rows", kind, Moments, lambda of: int(of.rows)),
            Metric("weight_sum", kind, Moments, lambda of: of.weight),
            # Rows whose prediction is NaN or infinite: from the first on, what depends on predictions is None.
            Metric("non_finite", kind, Moments, lambda of: int(of.non_finite)),
        )
    ),
    Metric("positives", "binary", Moments, lambda of: of.positives),  # sum of labels, without weights
    Metric("base_rate", "binary", PredictionTables, binary.base_rate),
    Metric("ne", "binary", PredictionTables, binary.ne, higher_is_better=False, label="NE"),
    Metric("log_loss", "binary", PredictionTables, binary.log_loss, higher_is_better=False, label="log loss"),
    Metric("auc", "binary", PredictionTables, binary.auc, higher_is_better=True, label="AUC"),
    Metric("calibration", "binary", PredictionTables, binary.calibration, label="calib"),
    Metric("ece", "binary", PredictionTables, binary.ece, higher_is_better=False, label="ECE"),
    Metric("pr_auc", "binary", PredictionTables, pr_auc, higher_is_better=True, label="PR-AUC"),
    Metric("mse", "regression", Moments, regression.mse, higher_is_better=False, label="MSE"),
    Metric("rmse", "regression", Moments, regression.rmse, higher_is_better=False, label="RMSE"),
    Metric("nrmse", "regression", Moments, regression.nrmse, higher_is_better=False, label="NRMSE"),
    Metric("r2", "regression", Moments, regression.r2, higher_is_better=True, label="R2"),
    Metric("mae", "regression", Moments, regression.mae, higher_is_better=False, label="MAE"),
    Metric("coverage", "regression", Moments, regression.coverage, label="coverage"),
    Metric("calibration", "regression", Moments, regression.calibration, label="calib"),
    Metric("label_mean", "regression", Moments, regression.label_mean),
    Metric("prediction_mean", "regression", Moments, regression.prediction_mean),
]
# Kind of task → name → metric.
METRICS = {kind: {m.name: m for m in _ALL if m.kind == kind} for kind in ("binary", "regression")}
# Kind of task → names of the metrics that the report's table shows.
COLUMNS = {
    "binary": (HEADLINE["binary"], RANKING["binary"], "calibration"),
    "regression": (HEADLINE["regression"], RANKING["regression"]),
}
