"""Metrics of each task over the observed, weighted rows: exact, in float64, and mergeable over ranks and shards."""

# Shapes: B rows, T tasks, G distinct predictions of one task, N updates in a window.

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from features.errors import UserError

ECE_BINS = 20
# Cells (one row of one binary task) to hold before they are sorted into the tables, or as many as the tables have once
# that is more: a cell is then sorted O(log cells) times.
COMPACT_CELLS = 1 << 20
_TINY = torch.finfo(torch.float64).tiny
_LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class TaskMetrics:
    """What is known of one task. None is undefined: no rows, one class, constant labels or a prediction not finite.

    Attributes:
        rows: rows that count: observed, of weight above 0.
        weight_sum: their weight.
        non_finite: those whose prediction is NaN or infinite; from the first on, what depends on predictions is None.
    """

    rows: int
    weight_sum: float
    non_finite: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Metric → value, ready for JSON, which knows neither NaN nor infinity."""
        return {k: v if v is not None and math.isfinite(v) else None for k, v in asdict(self).items()}


@dataclass(frozen=True)
class BinaryMetrics(TaskMetrics):
    """A binary task. A soft label y in [0, 1] is a positive row of weight y·w and a negative row of weight (1 - y)·w.

    Attributes:
        positives: sum of labels, without weights.
        base_rate: weighted mean label.
        ne: log loss over the entropy of the base rate (He et al. 2014, eq. 1); 1 is no better than the base rate.
        log_loss: nats per unit of weight.
        auc: probability that a positive outranks a negative, a tie counted half; not binned.
        calibration: sum of predictions / sum of labels, both weighted.
        ece: expected calibration error (Naeini et al. 2015) over 20 bins of equal mass: bins of equal width would hold
            nearly all rows of a rare label in the first. Equal predictions that straddle an edge are divided in
            proportion, so the order of rows cannot matter. Biased upwards on few rows, like every binned ECE.
    """

    positives: float
    base_rate: float | None = None
    ne: float | None = None
    log_loss: float | None = None
    auc: float | None = None
    calibration: float | None = None
    ece: float | None = None


@dataclass(frozen=True)
class RegressionMetrics(TaskMetrics):
    """A regression task, in the label's unit (mse: squared); all means are weighted.

    Attributes:
        nrmse: rmse / standard deviation of the labels (population, weighted); 1 is no better than their mean.
        r2: 1 - nrmse².
    """

    mse: float | None = None
    rmse: float | None = None
    nrmse: float | None = None
    r2: float | None = None
    label_mean: float | None = None
    prediction_mean: float | None = None


class Metrics:
    """Accumulates the predictions of T tasks and reports each task's metrics.

    Rows not observed or of weight 0 do not count, whatever they hold, NaN included. Shards of the same rows, merged in
    any order, give the same metrics up to the rounding of float64 sums. Everything is held on the CPU.

    Memory: a regression task keeps sums. An exact AUC needs every distinct prediction: a binary task keeps 24 bytes for
    each (logit and the weights of both classes). float32 logits hardly ever repeat, so plan 24 bytes per observed row
    and binary task on the rank that merges (2.4 GB per 100 million), and 100 at the peak, while one task's table is
    sorted. bfloat16 logits have at most 65,536 values and stay below 2 MB.

    Args:
        tasks: (name, kind) in the order of the tensors' columns; kind is "binary" (outputs are logits) or "regression"
            (outputs are the predictions).
    """

    def __init__(self, tasks: Sequence[tuple[str, str]]) -> None:
        self.tasks = tuple((name, kind) for name, kind in tasks)
        if unknown := {kind for _, kind in self.tasks} - {"binary", "regression"}:
            raise ValueError(f"task kinds {sorted(unknown)}: allowed are binary and regression")
        if len(dict(self.tasks)) < len(self.tasks):
            raise ValueError(f"task names repeat: {[name for name, _ in self.tasks]}")
        self._binary = [t for t, (_, kind) in enumerate(self.tasks) if kind == "binary"]
        keys = ("rows", "non_finite", "positives", "weight", "prediction", "squared_error", "label_mean", "label_m2")
        self._sums_T = {key: torch.zeros(len(self.tasks), dtype=torch.float64) for key in keys}
        # Per binary task, ascending by logit: logit, weight·label, weight·(1 - label). Its metrics come from these.
        self._tables_3G = {t: torch.zeros(3, 0, dtype=torch.float64) for t in self._binary}
        self._pending_3BT: list[Tensor] = []
        self._pending_cells = 0
        bounds = [(0.0, 1.0) if kind == "binary" else (-_LARGEST, _LARGEST) for _, kind in self.tasks]
        self._low_T, self._high_T = torch.tensor(bounds, dtype=torch.float64).reshape(-1, 2).T

    def update(self, logit_BT: Tensor, label_BT: Tensor, observed_BT: Tensor, weight_BT: Tensor) -> None:
        """Adds B rows.

        Raises:
            UserError: a row that counts has a label that is not finite (binary: not in [0, 1]), or a weight that is
                negative or not finite. A prediction that is not finite is no error: it is counted in `non_finite`.
        """
        given = (logit_BT, label_BT, observed_BT, weight_BT)
        if logit_BT.ndim != 2 or logit_BT.shape[1] != len(self.tasks) or len({x.shape for x in given}) > 1:
            raise ValueError(f"shapes {[tuple(x.shape) for x in given]}: all must be (rows, {len(self.tasks)} tasks)")
        if not len(logit_BT):
            return
        z_BT, y_BT, w_BT = (x.detach().to("cpu", torch.float64) for x in (logit_BT, label_BT, weight_BT))
        counts_BT = observed_BT.detach().to("cpu", torch.bool) & (w_BT != 0)
        self._check("weight", "finite and at least 0", counts_BT & ~((w_BT > 0) & (w_BT <= _LARGEST)))
        allowed_BT = (y_BT >= self._low_T) & (y_BT <= self._high_T)
        self._check("label", "finite (binary: in [0, 1])", counts_BT & ~allowed_BT)
        z_BT, y_BT, w_BT = (torch.where(counts_BT, x_BT, 0.0) for x_BT in (z_BT, y_BT, w_BT))

        finite_BT = z_BT.isfinite()
        weight_T = w_BT.sum(0)
        # The mean is taken around one of the labels, so that constant labels have a variance of exactly 0.
        pivot_1T = y_BT.gather(0, counts_BT.byte().argmax(0, keepdim=True))
        mean_T = (pivot_1T + (w_BT * (y_BT - pivot_1T)).sum(0, keepdim=True) / weight_T.clamp(min=_TINY)).squeeze(0)
        sums_T = {
            "rows": counts_BT.sum(0),
            "non_finite": (~finite_BT).sum(0),
            "positives": y_BT.sum(0),
            "weight": weight_T,
            "prediction": (w_BT * z_BT).sum(0),
            "squared_error": (w_BT * (z_BT - y_BT).square()).sum(0),
            "label_mean": mean_T,
            "label_m2": (w_BT * (y_BT - mean_T).square()).sum(0),
        }
        self._sums_T = _merge_sums(self._sums_T, {key: x_T.double() for key, x_T in sums_T.items()})
        if self._binary:
            # All that is not finite is one prediction: it keeps its weight in the base rate without growing the table.
            # Rows that do not count stay as well, all at logit 0 and of weight 0.
            rows_3BT = torch.stack((torch.where(finite_BT, z_BT, math.inf), w_BT * y_BT, w_BT * (1 - y_BT)))
            self._pending_3BT.append(rows_3BT[..., self._binary])
            self._pending_cells += len(y_BT) * len(self._binary)
            if self._pending_cells >= max(COMPACT_CELLS, sum(x_3G.shape[1] for x_3G in self._tables_3G.values())):
                self._compact()

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of the rows of both; neither is changed."""
        if self.tasks != other.tasks:
            raise ValueError(f"cannot merge metrics of tasks {self.tasks} and {other.tasks}")
        both = Metrics(self.tasks)
        both._sums_T = _merge_sums(self._sums_T, other._sums_T)
        a, b = self._compact(), other._compact()
        both._tables_3G = {t: _distinct(torch.cat((a[t], b[t]), dim=1)) for t in self._binary}
        return both

    def state(self) -> dict[str, Tensor]:
        """All that was accumulated: one (T,) sum per key and one (3, G) table per binary task, float64 on the CPU.

        Not copied, as tables are large, and never changed by later updates: do not write into it.
        """
        return self._sums_T | {f"table/{self.tasks[t][0]}": x_3G for t, x_3G in self._compact().items()}

    @classmethod
    def from_state(cls, tasks: Sequence[tuple[str, str]], state: dict[str, Tensor]) -> "Metrics":
        """What `state()` of metrics of the same tasks gave."""
        metrics = cls(tasks)
        expected = metrics.state()
        if state.keys() != expected.keys() or any(len(state[key]) != len(x) for key, x in expected.items()):
            raise ValueError(f"a state with {sorted(state)} is not one of tasks {metrics.tasks}")
        given = {key: x.detach().to("cpu", torch.float64) for key, x in state.items()}
        metrics._sums_T = {key: given[key] for key in metrics._sums_T}
        metrics._tables_3G = {t: given[f"table/{metrics.tasks[t][0]}"] for t in metrics._binary}
        return metrics

    def compute(self) -> dict[str, dict[str, float | int | None]]:
        """Task → metric → value, as `BinaryMetrics` and `RegressionMetrics` name them."""
        tables_3G = self._compact()
        report: dict[str, dict[str, float | int | None]] = {}
        for t, (name, _) in enumerate(self.tasks):
            sums = {key: float(x_T[t]) for key, x_T in self._sums_T.items()}
            report[name] = (_binary(sums, tables_3G[t]) if t in tables_3G else _regression(sums)).to_dict()
        return report

    def _compact(self) -> dict[int, Tensor]:
        """The tables, after sorting what is pending into them."""
        if self._pending_3BT:
            for column, t in enumerate(self._binary):
                pending = [rows_3BT[..., column] for rows_3BT in self._pending_3BT]
                self._tables_3G[t] = _distinct(torch.cat([self._tables_3G[t], *pending], dim=1))
            self._pending_3BT, self._pending_cells = [], 0
        return self._tables_3G

    def _check(self, what: str, rule: str, bad_BT: Tensor) -> None:
        if bad_BT.any():
            count, t = (int(x) for x in bad_BT.sum(0).max(0))
            raise UserError(
                f"task {self.tasks[t][0]}: {count} observed rows have a {what} that is not {rule}. "
                f"Mend the {what} in the schema and run jobs.preprocess again."
            )


class WindowedNE:
    """NE of each task over the last N updates, for the trainer: sums only, on the device until a value is asked for.

    A regression task has no entropy: its value is the weighted mean loss (MSE if its losses are squared errors).

    Args:
        tasks: (name, kind), as for `Metrics`.
        window: N.
        device: where the tensors of the updates are.
    """

    def __init__(self, tasks: Sequence[tuple[str, str]], window: int, device: torch.device | str = "cpu") -> None:
        self.binary = [kind == "binary" for _, kind in tasks]
        self.updates = 0
        self.sums_NT3 = torch.zeros(window, len(self.binary), 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, loss_BT: Tensor, label_BT: Tensor, observed_BT: Tensor, weight_BT: Tensor) -> Tensor:
        """Replaces the oldest update by B rows and returns their sums, as `sums_T3` has them of the window.

        `loss_BT` is per row, in nats for a binary task, not yet weighted.
        """
        weight_BT = torch.where(observed_BT.bool(), weight_BT, 0.0).double()
        ignored_BT = weight_BT == 0
        # Filled after the product: a row that does not count may hold NaN.
        loss_BT, label_BT = ((weight_BT * x_BT).masked_fill_(ignored_BT, 0.0) for x_BT in (loss_BT, label_BT))
        sums_T3 = torch.stack([x_BT.sum(0) for x_BT in (loss_BT, weight_BT, label_BT)], dim=-1)
        self.sums_NT3[self.updates % len(self.sums_NT3)] = sums_T3
        self.updates += 1
        return sums_T3

    def sums_T3(self) -> Tensor:  # noqa: N802
        """Sums of weight·loss, weight and weight·label over the window: additive over ranks."""
        return self.sums_NT3.sum(0)

    def value(self, sums_T3: Tensor | None = None) -> list[float]:
        """NE (regression: mean loss) per task, NaN without rows or with one class.

        Args:
            sums_T3: sums to use, e.g. those of all ranks; this one's window by default.
        """
        sums = (self.sums_T3() if sums_T3 is None else sums_T3).tolist()
        return [
            _windowed(loss, weight, positive, binary)
            for (loss, weight, positive), binary in zip(sums, self.binary, strict=True)
        ]


def _windowed(loss: float, weight: float, positive: float, binary: bool) -> float:
    if not binary:
        return loss / weight if weight else math.nan
    # An all-reduce may add the two sums in different orders, so those of one class need not be equal to the last bit; a
    # true base rate of 1e-12 would need 1e12 rows in the window.
    one_class = min(positive, weight - positive) <= 1e-12 * weight
    return math.nan if one_class else loss / _entropy(positive, weight - positive)


def _entropy(positive: float, negative: float) -> float:
    """Log loss, in nats summed over the weight, of predicting the base rate: P ln(W/P) + N ln(W/N)."""
    return positive * math.log1p(negative / positive) + negative * math.log1p(positive / negative)


def _merge_sums(a_T: dict[str, Tensor], b_T: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds; means and squared deviations after Chan et al. 1983: differences of sums of squares would cancel."""
    sums_T = {key: a_T[key] + b_T[key] for key in a_T}
    share_T = b_T["weight"] / sums_T["weight"].clamp(min=_TINY)
    delta_T = b_T["label_mean"] - a_T["label_mean"]
    sums_T["label_mean"] = a_T["label_mean"] + delta_T * share_T
    sums_T["label_m2"] += delta_T.square() * a_T["weight"] * share_T
    return sums_T


def _distinct(rows_3N: Tensor) -> Tensor:
    """Rows (logit, positive weight, negative weight) sorted by logit, equal logits added up: (3, N) -> (3, G)."""
    logit_G, group_N = rows_3N[0].unique(return_inverse=True)
    weight_2G = rows_3N.new_zeros(2, len(logit_G)).scatter_add_(1, group_N.expand(2, -1), rows_3N[1:])
    return torch.cat((logit_G.unsqueeze(0), weight_2G))


def _binary(sums: dict[str, float], table_3G: Tensor) -> BinaryMetrics:
    logit_G, positive_G, negative_G = table_3G
    positive, negative = float(positive_G.sum()), float(negative_G.sum())
    weight = positive + negative
    known = BinaryMetrics(int(sums["rows"]), sums["weight"], int(sums["non_finite"]), sums["positives"])
    if not weight:
        return known
    known = replace(known, base_rate=positive / weight)
    if known.non_finite:
        return known
    # Not softplus: torch's is linear above 20, an error of 2e-9.
    loss = -float(positive_G @ logsigmoid(logit_G) + negative_G @ logsigmoid(-logit_G))
    predicted_G = logit_G.sigmoid() * (positive_G + negative_G)
    known = replace(
        known,
        log_loss=loss / weight,
        calibration=float(predicted_G.sum()) / positive if positive else None,
        ece=_ece(predicted_G, positive_G, positive_G + negative_G),
    )
    if not positive or not negative:
        return known
    below_G = negative_G.cumsum(0) - negative_G / 2
    return replace(
        known,
        ne=loss / _entropy(positive, negative),
        auc=float(positive_G / positive @ below_G / negative),
    )


def _ece(predicted_G: Tensor, positive_G: Tensor, weight_G: Tensor) -> float:
    """Cuts the excess of predictions over labels, a function of the weight below, at equal distances.

    It is linear between predictions, so rounding cannot move a prediction from bin to bin.
    """
    weight, excess = (np.concatenate(([0.0], x_G.cumsum(0).numpy())) for x_G in (weight_G, predicted_G - positive_G))
    at_edge = np.interp(np.linspace(0.0, weight[-1], ECE_BINS + 1), weight, excess)
    return float(np.abs(np.diff(at_edge)).sum() / weight[-1])


def _regression(sums: dict[str, float]) -> RegressionMetrics:
    weight, error, m2 = sums["weight"], sums["squared_error"], sums["label_m2"]
    known = RegressionMetrics(int(sums["rows"]), weight, int(sums["non_finite"]))
    if not weight:
        return known
    return replace(
        known,
        mse=error / weight,
        rmse=math.sqrt(error / weight),
        nrmse=math.sqrt(error / m2) if m2 else None,
        r2=1 - error / m2 if m2 else None,
        label_mean=sums["label_mean"],
        prediction_mean=sums["prediction"] / weight,
    )
