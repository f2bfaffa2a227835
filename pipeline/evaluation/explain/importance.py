"""Permutation importance: how much worse a model is when a feature's values are those of other rows.

Breiman 2001, section 10; as the difference of two errors it is the model reliance of Fisher et al. 2019, section 3. It is of
the model as it stands: of two features that carry the same, each may do without the other, and only both together count.
"""

# Shapes: B rows of a batch, N rows, T tasks, K buckets.

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from features.batch import Batch, Rows, transposed
from features.schema.schema import Schema
from pipeline.evaluation.metrics import base
from pipeline.evaluation.metrics.base import Grouping, Tasks
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.metrics.sums import BucketSums, Sums
from pipeline.run.headline import HEADLINE, why_undefined
from pipeline.terminal import SECONDS, draws_bars

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """The headline metric of each task, NE or NRMSE: value_T, and left_out_TK without each bucket; NaN where undefined.

    Attributes:
        why_T: the reasons of undefined ones, empty texts for others.
    """

    value_T: np.ndarray
    left_out_TK: np.ndarray
    why_T: tuple[str, ...] = ()


class Sample:
    """Rows in memory and the model that scores them.

    Args:
        rows: the first of their keys is the hash of the cluster. schema: of the rows.
        score: Batch -> logit_BT. buckets: K, more than 1. batch_size: rows at a time.
    """

    def __init__(
        self, rows: Rows, schema: Schema, score: Callable[[Batch], Tensor], buckets: int, batch_size: int
    ) -> None:
        self.rows, self.schema, self.score, self.batch_size = rows, schema, score, batch_size
        self.tasks: Tasks = [(name, task.kind) for name, task in schema.tasks.items()]
        self.grouping = Grouping(buckets=buckets)

    def permuted(self, features: Sequence[str], order_N: Tensor) -> Rows:
        """The rows with the values of some features taken from the rows at `order_N`; lists and flags move as a whole."""
        rows, schema = self.rows, self.schema
        ids = [f for f, name in enumerate(schema.single) if name in features]
        bags = [g for g, name in enumerate(schema.lists) if name in features]
        numbers = [c for name, places in schema.dense_ranges.items() if name in features for c in places]
        moved = rows.take(order_N)
        id_NF, length_NG, dense_ND = rows.id_NF.clone(), rows.length_NG.clone(), rows.dense_ND.clone()
        id_NF[:, ids], length_NG[:, bags] = moved.id_NF[:, ids], moved.length_NG[:, bags]
        dense_ND[:, numbers] = moved.dense_ND[:, numbers]
        lists = [b if g in bags else a for g, (a, b) in enumerate(zip(rows.lists(), moved.lists(), strict=True))]
        value_V = transposed(torch.cat(lists), length_NG.t()) if bags else rows.value_V
        return replace(rows, id_NF=id_NF, length_NG=length_NG, value_V=value_V, dense_ND=dense_ND)

    @torch.inference_mode()
    def figures(self, rows: Rows) -> Figures:
        """The tasks' figures on these rows: the sample, or the sample permuted."""
        sums = Sums(self.tasks, self.grouping)
        for start in range(0, len(rows), self.batch_size):
            part = rows.slice(start, min(start + self.batch_size, len(rows)))
            batch = part.batch(self.schema, len(part))
            sums.update(_counted(batch, self.score(batch)))
        found = [METRICS[kind][HEADLINE[kind]].compute(sums.of_task(t)) for t, (_, kind) in enumerate(self.tasks)]
        left_out = [figure.left_out_SK[0] for figure in found if figure.left_out_SK is not None]
        value_T = np.array([figure.value_S[0] for figure in found])
        why_T = (
            "" if np.isfinite(value) else _why(sums.of_task(t), kind)
            for t, (value, (_, kind)) in enumerate(zip(value_T, self.tasks, strict=True))
        )
        return Figures(value_T, np.array(left_out), tuple(why_T))


def importances(
    sample: Sample, groups: Mapping[str, Sequence[str]], permutations: int, seed: int
) -> tuple[Figures, dict[str, Figures]]:
    """The tasks' figures, and of each group of features how much they rise when it is permuted.

    The values are permuted over the whole sample, the features of a group by one permutation. All groups share the
    permutations, so that what one has does not depend on which others there are; the rise is the mean over them.

    Args:
        groups: names, and the features of each.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(sample.rows), generator=generator) for _ in range(permutations)]
    before = sample.figures(sample.rows)
    rises: dict[str, Figures] = {}
    for name in _with_progress(list(groups)):
        after = [sample.figures(sample.permuted(groups[name], order_N)) for order_N in orders]
        value_T = np.mean([found.value_T for found in after], axis=0) - before.value_T
        rises[name] = Figures(value_T, np.mean([found.left_out_TK for found in after], axis=0) - before.left_out_TK)
    return before, rises


def _why(sums: BucketSums, kind: str) -> str:
    """Why a task's figure is undefined."""
    found = {name: metric.compute(sums) for name, metric in METRICS[kind].items() if metric.statistic is Sums}
    known = {name: float(figure.value_S[0]) for name, figure in found.items()}
    return why_undefined({name: value for name, value in known.items() if np.isfinite(value)})


def _counted(batch: Batch, logit_BT: Tensor) -> base.Rows:
    """A batch as statistics take it."""
    weight_BT = batch.weight_BT.double()
    counts_BT = batch.observed_BT & (weight_BT > 0)
    logit_BT, label_BT, weight_BT = (
        torch.where(counts_BT, x_BT.double(), 0.0) for x_BT in (logit_BT, batch.label_BT, weight_BT)
    )
    cluster_B = (batch.key_BC[:, 0].numpy() & 0xFFFFFFFF).astype(np.uint32)
    none = np.zeros((len(cluster_B), 0), np.int32)
    return base.Rows(logit_BT, label_BT, weight_BT, counts_BT, cluster_B, np.zeros(len(cluster_B), np.int64), none)


def _with_progress(names: list[str]) -> Iterator[str]:
    """The names, with a bar on a terminal and a line every 10 s elsewhere."""
    logged = time.monotonic()
    with tqdm(names, unit="feature", dynamic_ncols=True, disable=not draws_bars()) as bar:
        for done, name in enumerate(bar):
            if bar.disable and time.monotonic() - logged > SECONDS:
                logged = time.monotonic()
                logger.info("importance  %d/%d features", done, len(names))
            yield name
