"""How far the answers of a package are from those of its checkpoint, measured on rows of its dataset."""

# Shapes: B rows, T tasks.

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.batch import Rows
from features.errors import UserError
from features.schema.schema import Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.dataset.shards import open_shard, table_sizes
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.weights import Loading, ModelWeights
from pipeline.release.export.config import Source
from pipeline.run.headline import HEADLINE
from pipeline.serving.encoded import encoded
from pipeline.serving.scorer import Scorer

CHECKED_SPLITS: tuple[Split, ...] = ("valid", "test", "train")
LARGEST = 1e300  # stands for a difference that is not finite, which JSON cannot hold
MOST = 1e-4  # of |a - b| / (1 + |a|) between a package with all rows in float32 and its checkpoint


def checked_split(dataset: Dataset) -> Split:
    """The split whose rows are scored. Raises UserError where the dataset has none."""
    for split in CHECKED_SPLITS:
        if dataset.manifest.rows.get(split):
            return split
    raise UserError(f"{dataset.path} has no rows to compare the package with its checkpoint on. Set dataset=.")


def measured(source: Source, dataset: Dataset, scorer: Scorer, rows: int, exact: bool) -> dict[str, float]:
    """Scores the first rows of a split by the evaluator and by the package.

    Args:
        scorer: of the package. exact: it must agree with the checkpoint up to rounding.
    Returns: `rows`; `max_logit_difference`, and `max_relative_difference`, of |a - b| / (1 + |a|), over tasks and rows; by task
        HEADLINE.TASK.checkpoint and HEADLINE.TASK.package where it is defined.
    Raises:
        UserError: a package that does not agree.
    """
    split, schema = checked_split(dataset), dataset.schema
    weights = ModelWeights(source.run, dataset, [split], rows, Loading("needed"))
    weights.load(source.step)
    tasks = [(name, task.kind) for name, task in schema.tasks.items()]
    ours, theirs = Metrics(tasks), Metrics(tasks)
    furthest = relative = 0.0
    count = 0
    for table, part in _rows(dataset, split, rows):
        batch = part.batch(schema, len(part))
        wanted_BT, found_BT = weights(batch), scorer.score_encoded(encoded(table, schema))
        difference_BT = (wanted_BT.double() - found_BT.double()).abs()
        furthest = _larger(furthest, difference_BT)
        relative = _larger(relative, difference_BT / (1 + wanted_BT.double().abs()))
        theirs.update(wanted_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
        ours.update(found_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
        count += len(part)
    if exact and not relative <= MOST:
        raise UserError(
            f"{source.path}: the package's logits differ by {relative:.2g} of 1 + |logit| from the checkpoint's on split "
            f"{split} of {dataset.name}, more than {MOST:g}: this is a defect, nothing is written. Please report it."
        )
    found = {"rows": float(count), "max_logit_difference": furthest, "max_relative_difference": relative}
    for owner, metrics in (("checkpoint", theirs), ("package", ours)):
        for (task, kind), values in zip(tasks, _figures(metrics), strict=True):
            value = values.get(HEADLINE[kind])
            if value is not None and np.isfinite(value):
                found[f"{HEADLINE[kind]}.{task}.{owner}"] = value
    return {name: float(f"{min(value, LARGEST):.6g}") for name, value in found.items()}


def _larger(value: float, difference_BT: Tensor) -> float:
    """The larger one; infinite where a difference is none."""
    largest = float(torch.nan_to_num(difference_BT, nan=torch.inf).max()) if difference_BT.numel() else 0.0
    return max(value, largest)


def _figures(metrics: Metrics) -> list[dict[str, float | None]]:
    record = metrics.record(metrics.figures())["metrics"]
    return [record[name] for name, _ in metrics.tasks]


def _rows(dataset: Dataset, split: Split, most: int) -> Iterator[tuple[pa.Table, Rows]]:
    """The first rows of a split, as they are stored and as the evaluator reads them, a row group at a time."""
    loader, left, shards = Loader(dataset, split, most, table_sizes=table_sizes(dataset)), most, {}
    for group, (path, index) in enumerate(loader.groups):
        rows = loader.decode(group)
        if path not in shards:
            shards = {path: open_shard(dataset, loader.by_path[path])}
        table = shards[path].read_row_group(index, list(dataset.schema.columns), use_threads=False)
        yield table.slice(0, min(left, len(rows))), rows.slice(0, min(left, len(rows)))
        if (left := left - len(rows)) <= 0:
            return
