"""Metrics of each task over the observed, weighted rows, by slice and with intervals: mergeable over ranks and shards."""

# Shapes: B rows, T tasks, S slices, K buckets, L lines of the frame; C keys of a row: cluster, group, one a dimension.

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from features.errors import UserError
from pipeline.evaluation.metrics.base import Figure, Grouping, Rows, Statistic, Tasks
from pipeline.evaluation.metrics.evaluated import ALL
from pipeline.evaluation.metrics.evaluated import COLUMNS as FRAME
from pipeline.evaluation.metrics.intervals import buckets_used, standard_error
from pipeline.evaluation.metrics.kept_rows import KeptRows
from pipeline.evaluation.metrics.ranking import reliability
from pipeline.evaluation.metrics.registry import COUNTS, METRICS, TOTALS

_LARGEST = torch.finfo(torch.float64).max
Result = TypeVar("Result")
_FIRST_KEYS = 2  # before those of slices


class Metrics:
    """Accumulates the predictions of T tasks and reports each task's registered metrics.

    Rows not observed or of weight 0 do not count, whatever they hold, NaN included. Shards of the same rows, merged in
    any order, give the same metrics up to the rounding of float64 sums. Everything is kept on the CPU; `KeptRows`
    has the memory that it takes.

    Args:
        tasks: (name, kind) in the order of the tensors' columns; kind is "binary" (outputs are logits) or "regression"
            (outputs are the predictions).
        grouping: slices and buckets; by default none.
        dimensions: names of the grouping's dimensions.
    """

    def __init__(self, tasks: Tasks, grouping: Grouping | None = None, dimensions: tuple[str, ...] = ()) -> None:
        self.tasks = tuple((name, kind) for name, kind in tasks)
        self.grouping, self.dimensions = grouping or Grouping(), dimensions
        if unknown := {kind for _, kind in self.tasks} - METRICS.keys():
            raise ValueError(f"task kinds {sorted(unknown)}: allowed are {' and '.join(METRICS)}")
        if len(dict(self.tasks)) < len(self.tasks):
            raise ValueError(f"task names repeat: {[name for name, _ in self.tasks]}")
        kinds = dict.fromkeys(kind for _, kind in self.tasks)
        used = dict.fromkeys(metric.statistic for kind in kinds for metric in METRICS[kind].values())
        self.statistics: dict[type[Statistic], Statistic] = {s: s(self.tasks, self.grouping) for s in used}
        bounds = [(0.0, 1.0) if kind == "binary" else (-_LARGEST, _LARGEST) for _, kind in self.tasks]
        self.rows = 0
        # Of each task what its metrics are computed from; kept until the next update, since rows are sorted there.
        self.read: dict[int, dict[type[Statistic], Any]] = {}
        self._low_T, self._high_T = torch.tensor(bounds, dtype=torch.float64).reshape(-1, 2).T

    @torch.inference_mode()
    def update(
        self, logit_BT: Tensor, label_BT: Tensor, observed_BT: Tensor, weight_BT: Tensor, key_BC: Tensor | None = None
    ) -> None:
        """Adds B rows.

        Args:
            key_BC: int64: hash of the row's cluster (its low 32 bits count), its group, and for each dimension the place of its
                slice, -1 for none. None: each row is a cluster of its own by its place in the batch, in no slice.
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
        key_BC = self._no_keys(len(z_BT)) if key_BC is None else key_BC.cpu()
        cluster_B = (key_BC[:, 0].numpy() & 0xFFFFFFFF).astype(np.uint32)
        group_B = key_BC[:, 1].numpy().copy()  # a view would keep all keys in memory
        slice_BD = key_BC[:, _FIRST_KEYS:].numpy().astype(np.int16)
        # Rows are kept in the precision they have.
        dtype = np.float64 if any(x.dtype == torch.float64 for x in (logit_BT, label_BT, weight_BT)) else np.float32
        rows = Rows(z_BT, y_BT, w_BT, counts_BT, cluster_B, group_B, slice_BD, dtype)
        self.rows += int((w_BT != 0).any(1).sum())
        self.read = {}
        for statistic in self.statistics.values():
            statistic.update(rows)

    def _no_keys(self, rows: int) -> Tensor:
        key_BC = torch.full((rows, _FIRST_KEYS + len(self.grouping.slices)), -1)
        key_BC[:, 0] = torch.arange(rows) * 0x9E3779B1
        return key_BC

    def merge(self, other: "Metrics") -> "Metrics":
        """The metrics of the rows of both; neither is changed."""
        if self.tasks != other.tasks or self.grouping != other.grouping:
            ours, theirs = ((m.tasks, m.grouping) for m in (self, other))
            raise ValueError(f"cannot merge metrics of {ours} and {theirs}")
        both = Metrics(self.tasks, self.grouping, self.dimensions)
        both.rows = self.rows + other.rows
        both.statistics = {kind: ours.merge(other.statistics[kind]) for kind, ours in self.statistics.items()}
        return both

    def state(self) -> dict[str, np.ndarray]:
        """All that was accumulated, as arrays: not copied, as they are large, and not to be written into."""
        state = {key: x for statistic in self.statistics.values() for key, x in statistic.state().items()}
        return state | {"rows": np.array(self.rows)}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Replaces all by the `state()` of metrics of the same tasks and grouping."""
        self.read, self.rows = {}, int(state["rows"])
        for statistic in self.statistics.values():
            statistic.load(state)

    def figures(self) -> dict[str, dict[str, Figure]]:
        """Task → metric → its figure in every slice."""

        def of_task(kind: str, read: dict[type[Statistic], Any]) -> dict[str, Figure]:
            return {name: metric.compute(read[metric.statistic]) for name, metric in METRICS[kind].items()}

        return dict(zip((name for name, _ in self.tasks), self._of_tasks(of_task), strict=True))

    def _of_tasks(self, function: Callable[[str, dict[type[Statistic], Any]], Result]) -> list[Result]:
        """A function of each task's kind and of what its metrics are computed from."""
        for statistic in self.statistics.values():
            statistic.state()  # what waits to be added is, once and not by each thread

        def of_task(t: int) -> Result:
            if t not in self.read:
                self.read[t] = {used: statistic.of_task(t) for used, statistic in self.statistics.items()}
            return function(self.tasks[t][1], self.read[t])

        # NumPy computes most of it without Python's lock; the core of the thread that decoded rows is free by now.
        with ThreadPoolExecutor(torch.get_num_threads() + 1) as pool:
            return list(pool.map(of_task, range(len(self.tasks))))

    def compute(self) -> dict[str, dict[str, float | int | None]]:
        """Task → metric → value over all rows. None: undefined, as of no rows, of one class, or of infinite predictions."""
        return values_of(self.figures())

    def record(self, figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
        """What a record (pipeline.run.records) has of the figures of all rows."""
        return {
            "metrics": values_of(figures),
            "intervals": errors_of(figures),
            "buckets_used": used_of(figures),
            "reliability": self.reliability(),
            "ranking": self.ranking(),
        }

    def frame(self, figures: dict[str, dict[str, Figure]]) -> pl.DataFrame:
        """Figures as the frame of an `Evaluated`; slices without a row that counts for a task have no line of it."""
        names = [(ALL, ALL)]
        for dimension, slices in zip(self.dimensions, self.grouping.slices, strict=True):
            names += [(dimension, name) for name in slices]
        lines = [(task, name, figure) for task, known in figures.items() for name, figure in known.items()]
        count, buckets = len(names), self.grouping.buckets

        def left_out(name: str, figure: Figure) -> np.ndarray:
            left_SK = None if name in TOTALS else figure.left_out_SK
            return np.full((count, buckets), np.nan) if left_SK is None else left_SK

        value_L = _finite(np.concatenate([figure.value_S for _, _, figure in lines]))
        left_LK = _finite(np.concatenate([left_out(name, figure) for _, name, figure in lines]))
        intervals = [name not in TOTALS and figure.left_out_SK is not None for _, name, figure in lines]
        frame = pl.DataFrame(
            {
                "task": np.repeat([task for task, _, _ in lines], count),
                "metric": np.repeat([name for _, name, _ in lines], count),
                "dimension": [dimension for dimension, _ in names] * len(lines),
                "slice": [name for _, name in names] * len(lines),
                "rows": np.concatenate([figures[task]["rows"].value_S for task, _, _ in lines]).astype(np.int64),
                "value": value_L,
                "se": np.where(np.isnan(value_L), np.nan, standard_error(left_LK)),
                "left_out": pl.Series(left_LK).arr.to_list(),
                "intervals": np.repeat(intervals, count),
            }
        ).with_columns(
            pl.col("value", "se").fill_nan(None),
            pl.when("intervals").then(pl.col("left_out").list.eval(pl.element().fill_nan(None))).otherwise([]),
        )
        return frame.filter((pl.col("rows") > 0) | (pl.col("slice") == ALL)).select(
            pl.col(c).cast(t) for c, t in FRAME.items()
        )

    def reliability(self) -> dict[str, list[list[float | None]]]:
        """Of each binary task the reliability curve (`ranking.reliability`), empty where a prediction is not finite."""

        def of_task(kind: str, read: dict[type[Statistic], Any]) -> list[list[float | None]] | None:
            if kind != "binary":
                return None
            return [] if read[KeptRows].unknown_S[0] else reliability(read[KeptRows].ranked)

        curves = zip(self.tasks, self._of_tasks(of_task), strict=True)
        return {name: curve for (name, _), curve in curves if curve is not None}

    def ranking(self) -> Any:
        """How AUC of all rows was computed: exact, or the bound on its error where logits were put on a grid."""
        if not self.grouping.halvings:
            return "exact"
        errors = self._of_tasks(lambda kind, read: read[KeptRows].auc_error if kind == "binary" else 0.0)
        return {"sketch": max(errors, default=0.0), "share": self.grouping.kept}

    def _check(self, what: str, rule: str, bad_BT: Tensor) -> None:
        if bad_BT.any():
            count, t = (int(x) for x in bad_BT.sum(0).max(0))
            raise UserError(
                f"task {self.tasks[t][0]}: {count} observed rows have a {what} that is not {rule}. "
                f"Correct the {what} in the schema and run jobs.preprocess again."
            )


def values_of(figures: dict[str, dict[str, Figure]]) -> dict[str, dict[str, float | int | None]]:
    """Task → metric → value over all rows, for JSON, which knows neither NaN nor infinity."""

    def value(name: str, figure: Figure) -> float | int | None:
        number = float(figure.value_S[0])
        return None if not math.isfinite(number) else int(number) if name in COUNTS else number

    return {task: {name: value(name, figure) for name, figure in known.items()} for task, known in figures.items()}


def errors_of(figures: dict[str, dict[str, Figure]]) -> dict[str, dict[str, float]]:
    """Task → metric → standard error over all rows, where there is one."""
    return {
        task: {
            name: float(error)
            for name, figure in known.items()
            if figure.left_out_SK is not None and name not in TOTALS
            if math.isfinite(error := standard_error(figure.left_out_SK[0])) and math.isfinite(figure.value_S[0])
        }
        for task, known in figures.items()
    }


def used_of(figures: dict[str, dict[str, Figure]]) -> dict[str, dict[str, int]]:
    """Task → metric → how many buckets have rows of the task, of the metrics that can have a standard error."""
    return {
        task: {
            name: int(buckets_used(figure.left_out_SK[0]))
            for name, figure in known.items()
            if figure.left_out_SK is not None and name not in TOTALS
        }
        for task, known in figures.items()
    }


def _finite(value: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(value), value, np.nan)
