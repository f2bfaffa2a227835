"""Progressive validation: NE of each batch by the weights before it is trained on, and the rows that were.

Over a day, read in the order of time, that is the NE of a model which always knows the past and never the future
(Blum et al. 1999; McMahan et al. 2013, section 5).
"""

# Shapes: N updates of the window, T tasks, 3 sums: weight times loss, weight, weight times label.

from collections.abc import Mapping
from math import isnan
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from features.batch import PADDING
from features.schema.schema import Task
from pipeline.evaluation.metrics.windowed import WindowedNE
from pipeline.run import checkpoint
from pipeline.training.step import StepOutput


class ProgressiveMetrics:
    """Sums of this rank over the last N steps and over the day so far, and its rows.

    Args:
        tasks: of the schema. window: N. device: of the outputs.
    """

    def __init__(self, tasks: Mapping[str, Task], window: int, device: torch.device) -> None:
        self.kinds = {name: task.kind for name, task in tasks.items()}
        self.window = WindowedNE(list(self.kinds.items()), window, device)
        self.day_T3 = torch.zeros(len(tasks), 3, dtype=torch.float64, device=device)
        self.rows, self.rows_before = torch.zeros((), dtype=torch.int64, device=device), 0

    def update(self, output: StepOutput) -> None:
        """Adds a step."""
        self.day_T3 += self.window.update(*output[:4])
        self.rows += (output.row_id_B != PADDING).sum()

    def total_rows(self) -> int:
        """Rows that all ranks together have trained on. Every rank calls it."""
        rows = self.rows.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(rows)
        return self.rows_before + int(rows)

    def figures(self, sums_T3: Tensor) -> tuple[dict[str, dict[str, float | None]], Tensor]:
        """`ne` of binary tasks, `task_loss` of the others over all ranks' sums, and the sums. Every rank calls it.

        A regression task's loss is of standardised labels: squared error is 1 for a prediction of the train mean.
        """
        sums_T3 = sums_T3.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(sums_T3)
        sums_T3 = sums_T3.cpu()
        found = zip(self.kinds.items(), self.window.value(sums_T3), strict=True)
        values = {name: (kind, None if isnan(value) else value) for (name, kind), value in found}
        ne = {name: value for name, (kind, value) in values.items() if kind == "binary"}
        return {"ne": ne, "task_loss": {n: v for n, (_, v) in values.items() if n not in ne}}, sums_T3

    def state(self) -> dict[str, Tensor]:
        """This rank's sums, under names of its own: they are added up only when read."""
        rank = dist.get_rank()
        return {f"window.{rank}": self.window.sums_NT3, f"day.{rank}": self.day_T3}

    def restore(self, path: Path, rows: int, updates: int) -> None:
        """Restores the sums from a checkpoint of any number of ranks; after a change of N with an empty window.

        Args:
            rows, updates: of all ranks, at the checkpoint.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        shapes = {
            n.removeprefix("progress."): s for n, s in checkpoint.shapes(path).items() if n.startswith("progress.")
        }
        theirs = {name.rpartition(".")[2] for name in shapes}
        ours = {str(rank)} & theirs if len(theirs) == ranks else theirs if rank == 0 else set()
        parts = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items() if n.rpartition(".")[2] in ours}
        if parts:
            checkpoint.load(path, {"progress": parts}, alone=True)
        for name, own in (("window", self.window.sums_NT3), ("day", self.day_T3)):
            own.zero_()
            for part in (p for n, p in parts.items() if n.startswith(f"{name}.") and p.shape == own.shape):
                own += part.to(own.device)
        self.rows.zero_()
        self.rows_before, self.window.updates = rows, updates
