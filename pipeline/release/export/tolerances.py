"""How far the answers of a package are from those of its checkpoint, measured on rows of its dataset; too far is an error."""

# Shapes: B rows, T tasks, E numbers of all embeddings of a row, N rows of a table, D numbers of one.

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.batch import Rows
from features.errors import UserError
from features.schema.schema import Schema, Split
from models.ranker import Ranker, table_weights
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.loader import Loader
from pipeline.dataset.shards import open_shard, table_sizes
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.weights import Loading, ModelWeights
from pipeline.release.export.config import Source
from pipeline.release.export.tables import Kept
from pipeline.run.headline import HEADLINE
from pipeline.serving.encoded import encoded
from pipeline.serving.manifest import TableFormat
from pipeline.serving.program import Program
from pipeline.serving.scorer import Scorer

CHECKED_SPLITS: tuple[Split, ...] = ("valid", "test", "train")
LARGEST = 1e300  # stands for a difference that is not finite, which JSON cannot hold
MOST = 1e-4  # of |a - b| / (1 + |a|) between the logits of two programs of the same embeddings
ROUNDING = 1e-5  # of a row's largest number: of sums of float32 in another order


def checked_split(dataset: Dataset) -> Split:
    """The split whose rows are scored. Raises UserError where the dataset has none."""
    for split in CHECKED_SPLITS:
        if dataset.manifest.rows.get(split):
            return split
    raise UserError(f"{dataset.path} has no rows to compare the package with its checkpoint on. Set dataset=.")


@torch.no_grad()
def measured(
    source: Source, dataset: Dataset, scorer: Scorer, rows: int, kept: Kept | None, compiled: Program | None = None
) -> dict[str, float]:
    """Scores the first rows of a split by the evaluator and by the package.

    Args:
        scorer: of the package. kept: the rows that it stores (occurring_rows). compiled: its other program.
    Returns: `rows`; `max_logit_difference`, and `max_relative_difference`, of |a - b| / (1 + |a|), over tasks and rows; the
        latter of the programs alone, on the same embeddings: `program.…` of the package's to the checkpoint's, `compiled.…` of
        the compiled one to the package's; by task HEADLINE.TASK.checkpoint and HEADLINE.TASK.package where it is defined.
    Raises:
        UserError: embeddings that are further from the checkpoint's than the format explains, or programs that do not agree.
    """
    split, schema = checked_split(dataset), dataset.schema
    first = dataset.of(first_shards(dataset, split, rows))
    weights = ModelWeights(source.run, first, [split], rows, Loading("needed"))
    weights.load(source.step)
    ranker = weights.ranker
    bounds = bounds_of(ranker, schema, weights.rows_of(ranker), scorer.manifest.format, kept)
    tasks = [(name, task.kind) for name, task in schema.tasks.items()]
    ours, theirs = Metrics(tasks), Metrics(tasks)
    largest = Largest(source, f"split {split} of {dataset.name}")
    count = 0
    for table, part in _rows(first, split, rows):
        batch, given = part.batch(schema, len(part)), encoded(table, schema)
        inputs, wanted_BT, found_BE = weights.model_input(batch), weights(batch), scorer.tables.embed(given)
        largest.check_embeddings(ranker.embedded(inputs).cpu(), found_BE, bounds.embedded(inputs).cpu())
        exact_BT = ranker.units(ranker.dense_outputs(found_BE.to(weights.device), inputs)).cpu()
        found_BT = scorer.program(found_BE, given.dense_BD)
        largest.check_program("program", exact_BT, found_BT)
        if compiled is not None:
            largest.check_program("compiled", found_BT, compiled(found_BE, given.dense_BD))
        largest.add("max_logit_difference", (wanted_BT.double() - found_BT.double()).abs())
        largest.add("max_relative_difference", relative(wanted_BT, found_BT))
        theirs.update(wanted_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
        ours.update(found_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
        count += len(part)
    # Two digits: on another processor the last ones are others, and the same checkpoint is to give the same bytes there.
    found = {"rows": float(count)} | {name: float(f"{value:.2g}") for name, value in largest.values.items()}
    for owner, metrics in (("checkpoint", theirs), ("package", ours)):
        for (task, kind), values in zip(tasks, _figures(metrics), strict=True):
            value = values.get(HEADLINE[kind])
            if value is not None and np.isfinite(value):
                found[f"{HEADLINE[kind]}.{task}.{owner}"] = float(f"{min(value, LARGEST):.6g}")
    return found


class Largest:
    """The largest differences so far, by name. Args: where: what was scored, for errors."""

    def __init__(self, source: Source, where: str) -> None:
        self.source, self.where = source, where
        self.values: dict[str, float] = {}

    def add(self, name: str, difference: Tensor) -> float:
        """Takes differences, of which one that is no number counts as the largest; returns the largest so far."""
        largest = float(torch.nan_to_num(difference, nan=LARGEST, posinf=LARGEST).max()) if difference.numel() else 0.0
        self.values[name] = min(max(self.values.get(name, 0.0), largest), LARGEST)
        return self.values[name]

    def check_embeddings(self, wanted_BE: Tensor, found_BE: Tensor, bound_BE: Tensor) -> None:
        """Raises UserError where embeddings differ by more than a bound."""
        difference_BE = (wanted_BE - found_BE).abs()
        if not bool((difference_BE <= bound_BE).all()):
            most = float(torch.nan_to_num(difference_BE, nan=LARGEST).max())
            raise self._defect(f"its embeddings differ by {most:.2g}", "more than their format explains")

    def check_program(self, name: str, wanted_BT: Tensor, found_BT: Tensor) -> None:
        """Raises UserError where logits of the same embeddings are not the same up to rounding."""
        if (most := self.add(f"{name}.max_relative_difference", relative(wanted_BT, found_BT))) > MOST:
            whose, of = (
                ("its compiled", "its portable one") if name == "compiled" else ("its", "the checkpoint's model")
            )
            raise self._defect(
                f"logits of {whose} program differ by {most:.2g} from those of {of}", f"more than {MOST:g}"
            )

    def _defect(self, what: str, limit: str) -> UserError:
        return UserError(
            f"{self.source.path}: the package differs: {what} on {self.where}, {limit}. This is a defect, nothing is written: "
            "please report it."
        )


def relative(wanted_BT: Tensor, found_BT: Tensor) -> Tensor:
    """|a - b| / (1 + |a|), in float64."""
    return (wanted_BT.double() - found_BT.double()).abs() / (1 + wanted_BT.double().abs())


@torch.no_grad()
def bounds_of(
    ranker: Ranker, schema: Schema, held: Mapping[str, np.ndarray], form: TableFormat, kept: Kept | None
) -> Ranker:
    """The model with bounds in the place of its tables' numbers: how far those of a package may be from them.

    An embedding is a row, or a mean of rows, so what this model embeds bounds the difference of embeddings. A row that is not
    kept embeds as 0.

    Args:
        ranker: the model. schema: of it. held: of its tables that do not hold all rows, and of those with rows left out, which
            rows they hold, ascending. kept: the rows that are stored (occurring_rows).
    """
    bounds = copy.deepcopy(ranker)
    state, names = bounds.state_dict(), table_weights(bounds)
    for table in bounds.tables:
        weight_ND = state[names[table.name]]
        bound_ND = row_bounds(weight_ND, form)
        kept_K = (kept or {}).get(schema.table_of(table.feature_names[0]))
        if kept_K is not None:
            absent_N = torch.from_numpy(~np.isin(held[table.name], kept_K)).to(weight_ND.device)
            bound_ND = torch.where(absent_N.unsqueeze(1), weight_ND.abs() * (1 + ROUNDING), bound_ND)
        weight_ND.copy_(bound_ND)
    return bounds


def row_bounds(weight_ND: Tensor, form: TableFormat) -> Tensor:
    """bound_ND of how far numbers may be from those that are stored of them."""
    largest_N1 = weight_ND.abs().amax(1, keepdim=True)
    range_N1 = weight_ND.amax(1, keepdim=True) - weight_ND.amin(1, keepdim=True)
    rounding_N1 = largest_N1 * ROUNDING
    if form == "fp32":
        return rounding_N1.expand_as(weight_ND)
    if form == "fp16":  # half a unit of its 11 bits, and of its smallest number
        return weight_ND.abs() * 2.0**-11 + 2.0**-25 + rounding_N1
    if form == "int8":  # half a step; 1e-8 is what FBGEMM adds to the range
        return (range_N1 / 510 + 1e-8 + rounding_N1).expand_as(weight_ND)
    # Half a step, whose size and the row's least number are rounded to 11 bits, and are no finer than float16's smallest one.
    return (range_N1 / 30 + largest_N1 * 2.0**-9 + 1e-6).expand_as(weight_ND)


def first_shards(dataset: Dataset, split: Split, rows: int) -> list[Shard]:
    """The first shards of a split that have so many rows."""
    found: list[Shard] = []
    for shard in dataset.shards(split):
        if sum(other.rows for other in found) >= rows:
            break
        found.append(shard)
    return found


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
