"""Metrics of each task over the observed, weighted rows: exact, in float64, and mergeable over ranks and shards."""

# Shapes: B rows, T tasks.

import math

import torch
from torch import Tensor

from features.errors import UserError
from pipeline.evaluation.metrics.base import Rows, Statistic, Tasks
from pipeline.evaluation.metrics.registry import METRICS

_LARGEST = torch.finfo(torch.float64).max


class Metrics:
    """Accumulates the predictions of T tasks and reports each task's registered metrics.

    Rows not observed or of weight 0 do not count, whatever they hold, NaN included. Shards of the same rows, merged in
    any order, give the same metrics up to the rounding of float64 sums. Everything is kept on the CPU; `PredictionTables`
    has the memory that it takes.

    Args:
        tasks: (name, kind) in the order of the tensors' columns; kind is "binary" (outputs are logits) or "regression"
            (outputs are the predictions).
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tuple((name, kind) for name, kind in tasks)
        if unknown := {kind for _, kind in self.tasks} - METRICS.keys():
            raise ValueError(f"task kinds {sorted(unknown)}: allowed are {' and '.join(METRICS)}")
        if len(dict(self.tasks)) < len(self.tasks):
            raise ValueError(f"task names repeat: {[name for name, _ in self.tasks]}")
        kinds = dict.fromkeys(kind for _, kind in self.tasks)
        used = dict.fromkeys(metric.statistic for kind in kinds for metric in METRICS[kind].values())
        self.statistics: dict[type[Statistic], Statistic] = {statistic: statistic(self.tasks) for statistic in used}
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
        rows = Rows(z_BT, y_BT, w_BT, counts_BT)
        for statistic in self.statistics.values():
            statistic.update(rows)

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of the rows of both; neither is changed."""
        if self.tasks != other.tasks:
            raise ValueError(f"cannot merge metrics of tasks {self.tasks} and {other.tasks}")
        both = Metrics(self.tasks)
        both.statistics = {kind: ours.merge(other.statistics[kind]) for kind, ours in self.statistics.items()}
        return both

    def state(self) -> dict[str, Tensor]:
        """All that was accumulated: one (T,) sum per key and one (3, G) table per binary task, float64 on the CPU.

        Not copied, as tables are large, and never changed by later updates: do not write into it.
        """
        return {key: x for statistic in self.statistics.values() for key, x in statistic.state().items()}

    @classmethod
    def from_state(cls, tasks: Tasks, state: dict[str, Tensor]) -> "Metrics":
        """The metrics of the same tasks whose `state()` this is. Raises ValueError for a state of other tasks."""
        metrics = cls(tasks)
        expected = metrics.state()
        if state.keys() != expected.keys() or any(len(state[key]) != len(x) for key, x in expected.items()):
            raise ValueError(f"a state with {sorted(state)} is not one of tasks {metrics.tasks}")
        given = {key: x.detach().to("cpu", torch.float64) for key, x in state.items()}
        for statistic in metrics.statistics.values():
            statistic.load(given)
        return metrics

    def compute(self) -> dict[str, dict[str, float | int | None]]:
        """Task → metric → value. None is undefined: no rows, one class, constant labels or a prediction not finite."""
        report: dict[str, dict[str, float | int | None]] = {}
        for t, (name, kind) in enumerate(self.tasks):
            metrics = METRICS[kind].values()
            of_task = {used: self.statistics[used].of_task(t) for used in {metric.statistic for metric in metrics}}
            values = {metric.name: metric.compute(of_task[metric.statistic]) for metric in metrics}
            # JSON knows neither NaN nor infinity.
            report[name] = {n: v if v is not None and math.isfinite(v) else None for n, v in values.items()}
        return report

    def _check(self, what: str, rule: str, bad_BT: Tensor) -> None:
        if bad_BT.any():
            count, t = (int(x) for x in bad_BT.sum(0).max(0))
            raise UserError(
                f"task {self.tasks[t][0]}: {count} observed rows have a {what} that is not {rule}. "
                f"Correct the {what} in the schema and run jobs.preprocess again."
            )
