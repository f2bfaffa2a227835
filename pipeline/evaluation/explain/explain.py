"""Explains a checkpoint: importance of its features and affinity of its tasks, on rows of a split that stay in memory."""

# Shapes: N rows, B rows of a batch, T tasks, K buckets.

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from features.batch import Batch, Rows
from features.errors import UserError, did_you_mean
from features.plain_json import first_fault
from features.schema.schema import Schema, Split
from pipeline import cores
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.days import Days, MissingDays
from pipeline.dataset.loader import Loader
from pipeline.dataset.shards import table_sizes
from pipeline.evaluation.explain.affinity import affinities
from pipeline.evaluation.explain.importance import Figures, Sample, importances
from pipeline.evaluation.follow import EvaluateConfig, dataset_of
from pipeline.evaluation.metrics.intervals import buckets_used, quantile, standard_error
from pipeline.evaluation.metrics.row_keys import SplitKeys
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.weights import Loading, ModelWeights, Tables
from pipeline.run import checkpoint, explanation
from pipeline.run.explanation import Affinity, Explanation, Importance, Rise, TaskFigure
from pipeline.run.headline import HEADLINE
from pipeline.run.run import Run
from pipeline.storage.store_path import Place


class ExplainConfig(BaseModel):
    """Settings of jobs.explain; see jobs/conf/explain.yaml."""

    model_config = ConfigDict(extra="forbid")
    run: Place
    step: int | Literal["newest"] = "newest"
    split: Split = "test"
    dataset: Place | None = None
    days: Days = None
    missing_days: MissingDays | None = None
    rows: int = Field(200_000, ge=1)
    features: list[str] | None = None
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] | None = None
    permutations: int = Field(3, ge=1, le=1000)
    seed: int = Field(0, ge=0, lt=1 << 63)
    buckets: int = Field(100, ge=2, le=1000)
    cluster_by: str | None = None
    confidence: float = Field(0.95, gt=0, lt=1)
    affinity_batches: int = Field(20, ge=0)
    tables: Tables = "all"
    batch_size: int = Field(8192, ge=1)
    threads: int | None = Field(None, ge=1)


class _Rate(BaseModel):
    lr: float = Field(gt=0, allow_inf_nan=False)


class _TrainRates(BaseModel):
    """What is read of a run's settings, which may be untrusted."""

    batch_size: int = Field(ge=1, le=1 << 24)
    dense: _Rate
    tables: _Rate


def explain(config: ExplainConfig) -> Explanation:
    """Explains one checkpoint and writes the file. Raises UserError: bad input."""
    torch.set_num_threads(config.threads or cores.available())
    run = Run(config.run)
    source = {"run": config.run, "dataset": config.dataset, "days": config.days, "missing_days": config.missing_days}
    dataset = dataset_of(run, EvaluateConfig(**source)).only(run.config().get("tasks"))
    dataset.check_compatible(run.schema().fingerprint, f"the run {run.path}")
    groups = permuted_groups(dataset.schema, config.features, config.groups or {})
    rates = _train_rates(run)
    step = _step(run, config.step)
    share = min(1.0, config.rows / sum(shard.rows for shard in dataset.shards(config.split)))
    measure = MeasureConfig(
        cold_start=False, by_time=[], buckets=config.buckets, cluster_by=config.cluster_by, share=share
    )
    keys = SplitKeys(measure, dataset, [config.split])
    rows = read_rows(dataset, config.split, keys)
    weights = ModelWeights(run, dataset, [config.split], config.batch_size, Loading(config.tables))
    manifest = weights.load(step)
    sample = Sample(rows, dataset.schema, weights, config.buckets, config.batch_size)
    figures, rises = importances(sample, groups, config.permutations, config.seed)
    found = Explanation(
        run=str(run.path), step=step, checkpoint=manifest.checksum, dataset=dataset.name, split=config.split,
        rows=len(rows), share=share, cluster=keys.cluster, buckets=config.buckets, permutations=config.permutations,
        seed=config.seed, confidence=config.confidence, figures=_figures(dataset.schema, figures),
        importance=_importance(dataset.schema, groups, rises, config.confidence),
        affinity=_affinity(weights, rows, rates, config),
    )  # fmt: skip
    explanation.write(found, run)
    return found


def permuted_groups(
    schema: Schema, features: Sequence[str] | None, groups: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """What is permuted, by name: each of `features` (None: all) by itself, then the groups, each at once.

    Raises:
        UserError: a feature that does not exist, or a group with the name of a feature.
    """
    known = list(schema.features)
    for key, names in (("features", features or []), *((f"groups.{name}", group) for name, group in groups.items())):
        for name in names:
            if name not in known:
                near = did_you_mean(name, known)
                raise UserError(f"{key}: the schema has no feature {name}{near}. There are {', '.join(known)}.")
    if taken := [name for name in groups if name in known]:
        raise UserError(f"groups.{taken[0]}: a feature has that name. Give the group another one.")
    return {name: [name] for name in (known if features is None else features)} | {n: [*g] for n, g in groups.items()}


def read_rows(dataset: Dataset, split: Split, keys: SplitKeys) -> Rows:
    """The rows of a split that `keys` takes. Raises UserError where there are none, or a shard cannot be read."""
    loader = Loader(dataset, split, 1, table_sizes=table_sizes(dataset), keys=keys)
    rows = Rows.concat([loader.decode(group) for group in range(len(loader.groups))])
    if not len(rows):
        raise UserError(f"{dataset.path}: the share of split {split} that rows= stands for has no rows. Raise rows.")
    return rows


def _step(run: Run, wanted: int | Literal["newest"]) -> int:
    found = checkpoint.steps(run.checkpoints)
    if not found or (wanted != "newest" and wanted not in found):
        what = "any" if wanted == "newest" else f"step {wanted}"
        raise UserError(f"{run.checkpoints}: no checkpoint ({what}); there are {found or 'none'}")
    return found[-1] if wanted == "newest" else wanted


def _train_rates(run: Run) -> _TrainRates:
    try:
        return _TrainRates.model_validate(run.config()["train"])
    except ValidationError as error:
        file = run.path / "config.yaml"
        raise UserError(f"{file}: train.{first_fault(error)}. It is not as jobs.train wrote it: restore it.") from None


def _figures(schema: Schema, figures: Figures) -> dict[str, TaskFigure]:
    return {
        name: TaskFigure(metric=HEADLINE[task.kind], value=_number(value), why=why)
        for (name, task), value, why in zip(schema.tasks.items(), figures.value_T, figures.why_T, strict=True)
    }


def _importance(
    schema: Schema, groups: Mapping[str, list[str]], rises: Mapping[str, Figures], confidence: float
) -> list[Importance]:
    found = [
        (float(np.nan_to_num(rise.value_T).mean()), name, _rises(list(schema.tasks), rise, confidence))
        for name, rise in rises.items()
    ]
    found.sort(key=lambda entry: -entry[0])
    return [Importance(name=name, features=groups[name], tasks=tasks) for _, name, tasks in found]


def _rises(tasks: Sequence[str], rise: Figures, confidence: float) -> dict[str, Rise]:
    error_T = standard_error(rise.left_out_TK)
    reach_T = quantile(confidence, buckets_used(rise.left_out_TK)) * error_T
    columns = (rise.value_T, error_T, rise.value_T - reach_T, rise.value_T + reach_T)
    return {
        task: Rise(value=_number(value), se=_number(error), low=_number(low), high=_number(high))
        for task, value, error, low, high in zip(tasks, *columns, strict=True)
    }


def _affinity(weights: ModelWeights, rows: Rows, rates: _TrainRates, config: ExplainConfig) -> Affinity | None:
    if not config.affinity_batches:
        return None
    schema = weights.dataset.schema
    size = min(rates.batch_size, len(rows))
    count = min(config.affinity_batches, len(rows) // size)
    batches = map(weights.model_input, _random_batches(rows, schema, size, count, config.seed))
    z_TT, error_TT = affinities(weights.ranker, batches, rates.dense.lr, rates.tables.lr)
    return Affinity(
        tasks=list(schema.tasks), batches=count, batch_rows=size, dense_rate=rates.dense.lr, table_rate=rates.tables.lr,
        z_TT=[[_number(z) for z in row] for row in z_TT], se_TT=[[_number(e) for e in row] for row in error_TT],
    )  # fmt: skip


def _random_batches(rows: Rows, schema: Schema, size: int, count: int, seed: int) -> Iterator[Batch]:
    """Batches of rows drawn without replacement: those that follow each other are of one time, or of one user."""
    order_N = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    for index_B in order_N[: size * count].split(size):
        yield rows.take(index_B).batch(schema, size)


def _number(value: Any) -> float | None:
    """For JSON, which knows neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None
