"""Capacity planning: whether a model's tables fit on a cluster, how they would be placed, and how long a step takes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import ByteSize, Field, model_validator

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.emm import EMMSettings
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import Days, MissingDays
from pipeline.dataset.lanes import check_sizes
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.training.architecture_file import with_architecture
from pipeline.training.config import Settings
from pipeline.training.optim import weighting
from pipeline.training.optim.strict import Strict
from pipeline.training.parallel import plan, scaling, shard
from pipeline.training.parallel.hardware import KINDS, Link
from pipeline.training.parallel.memory import Estimate, checkpoint_copy_bytes, readable
from pipeline.training.parallel.row_load import RowLoad, activation_bytes, ids_per_row
from pipeline.training.parallel.topology import RESERVE, Cluster
from pipeline.training.step import TrainStep

UNLIMITED = 1 << 60


class PlanConfig(TrackingSettings, Strict):
    """The settings of jobs.train that a plan depends on, and the cluster. Those of tracking are read and have no effect.

    Attributes:
        dataset: whose fitted encoders give the tables' sizes; without it the schema gives the largest they can be.
        run, resume: settings of jobs.train that must be left at their defaults, since a plan reads no run.
        ranks: of the cluster; None with `kind`: step times alone. ranks_per_node: on each machine.
        hbm: of each rank's GPU, by default that of its kind. ddr: main memory for each rank. Both in bytes, or as 80GB, 80GiB.
        kind: of rank (pipeline.training.parallel.hardware.KINDS), whose figures the plan and step times go by; it decides
            `device`. None: a plan by hardware.DEFAULTS, and no step times.
        link: rate of each node's network. scale: numbers of ranks that step times are for.
    """

    dataset: Path | None = None
    days: Days = None
    missing_days: MissingDays = "refuse"
    tasks: list[str] | None = None
    run: Path | None = None
    resume: str = "auto"
    model: ModelConfig
    train: Settings
    ranks: int | None = Field(None, ge=1)
    ranks_per_node: int = Field(8, ge=1)
    device: Literal["cuda", "cpu"] = "cuda"
    hbm: ByteSize | None = None
    ddr: ByteSize | None = None
    kind: str | None = None
    link: str = "100gbit"
    scale: list[Annotated[int, Field(ge=1)]] = Field([1 << power for power in range(10)], min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _as_its_kind(cls, given: dict[str, Any]) -> dict[str, Any]:
        if (name := given.get("kind")) is None:
            return given
        if name not in KINDS:
            raise ValueError(f"kind={name}: no figures of it; choose from {', '.join(KINDS)}")
        Link.named(given.get("link") or "100gbit")
        kind = KINDS[name]
        return given | {"device": kind.device, "hbm": given.get("hbm") or kind.memory or None}

    @model_validator(mode="after")
    def _consistent(self) -> "PlanConfig":
        if self.ranks is None and self.kind is None:
            raise ValueError(
                "ranks is missing: set the size of the cluster, or kind= for step times on 1, 2, 4, ... ranks"
            )
        if self.run is not None or self.resume != "auto":
            raise ValueError("jobs.plan reads no run: leave run= and resume= out")
        needed, example = ("hbm", "80GB") if self.device == "cuda" else ("ddr", "16GB")
        if getattr(self, needed) is None:
            raise ValueError(
                f"{needed} is missing: set the memory that each rank has on device={self.device}, such as {needed}={example}"
            )
        if self.ranks and self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise ValueError(f"ranks={self.ranks} must be a multiple of ranks_per_node={self.ranks_per_node}")
        if getattr(self, needed) < 1 << 20:
            raise ValueError(
                f"{needed}={getattr(self, needed)} is less than a megabyte; expected something like {needed}={example}"
            )
        return self

    @property
    def cluster(self) -> Cluster:
        """For the planner."""
        ranks = self.ranks or 1
        return Cluster(
            ranks,
            min(ranks, self.ranks_per_node),
            self.device,
            int(self.hbm or 0) if self.device == "cuda" else 0,
            int(self.ddr or UNLIMITED),
            KINDS[self.kind] if self.kind else None,
            Link.named(self.link),
        )


def capacity_report(config: PlanConfig, schema: Schema | None) -> list[str]:
    """The plan of tables that fit, and step times if a kind of rank is named, in lines. Arguments and errors as `planned`."""
    config = _with_architecture(config)
    tables = _tables(config, schema)
    lines = [tables.bounds] if tables.bounds else []
    if config.ranks:
        estimated = _place(config, tables)
        order = config.train.order(config.ranks)
        if config.ranks > order.lanes and order.batch_size % config.ranks == 0:
            several = math.ceil(config.ranks / order.lanes)
            lines.append(
                f"{order.lanes} lanes: {several} ranks decode each row group; train.lanes={config.ranks}: one rank"
            )
        lines += [f"warning: {costly}"] if (costly := estimated.costly_averages()) else []
        lines = [*estimated.lines(), *lines, _summary(estimated, config)]
    if config.kind is None:
        return lines
    model = scaling.Model.of(tables.schema, tables.encoders, config.model, config.train, tables.dataset)
    cluster, kind, link = config.cluster, KINDS[config.kind], Link.named(config.link)
    cluster = replace(cluster, ranks_per_node=config.ranks_per_node)
    more = scaling.scaling_report(model, config.train, cluster, kind, link, config.scale)
    return [*lines, *more]


def planned(config: PlanConfig, schema: Schema | None) -> Estimate:
    """The plan of tables that fit on config.ranks.

    Args:
        schema: if given with a dataset, the dataset must have been written for it.
    Raises:
        UserError: tables that do not fit, or of unknown size; settings that contradict each other.
    """
    config = _with_architecture(config)
    return _place(config, _tables(config, schema))


def _with_architecture(config: PlanConfig) -> PlanConfig:
    return config.model_copy(update={"model": with_architecture(config.model)})


class _Tables(NamedTuple):
    """What decides the sizes of tables. bounds: a line that names those whose sizes are upper bounds, if any."""

    schema: Schema
    encoders: Encoders
    bounds: str
    dataset: Dataset | None


def _tables(config: PlanConfig, schema: Schema | None) -> _Tables:
    if config.ranks:
        order = config.train.order(config.ranks)
        check_sizes(order.batch_size, order.lanes, config.ranks)
    if config.model.fusion.get("name") == "emm" and not EMMSettings.of(config.model).sources:
        raise UserError(
            "model=emm takes its tables from trained runs (model.from): plan the models that it is fused from instead"
        )
    if config.dataset:
        dataset = open_dataset(config.dataset, config.days, config.missing_days)
        if schema is not None:
            dataset.check_compatible(schema.fingerprint, "the schema of this job")
        dataset = dataset.only(config.tasks)
        return _Tables(dataset.schema, dataset.encoders, "", dataset)
    if schema is None:
        raise UserError("no tables to plan: set dataset=PATH, or data=NAME for the tables of a schema")
    schema = schema.only(config.tasks)
    return _Tables(schema, largest(schema), _bounds(schema), None)


def _place(config: PlanConfig, tables: _Tables) -> Estimate:
    settings = config.train
    ranker = shard.unplaced(tables.schema, tables.encoders, config.model, settings)
    loss = weighting.task_loss(settings.weighting, tables.schema.tasks, settings.seed)
    model = TrainStep(ranker, loss, bf16=False)
    ids, _ = ids_per_row(tables.schema, tables.dataset)
    activations = activation_bytes(tables.schema, tables.encoders, config.model, settings.precision == "bf16")
    load, cluster = RowLoad(ids, activations), config.cluster
    prefetch = settings.is_pipelined(cluster.device, ranker.managed is not None)
    return plan.place(model, shard.sharders(settings), ranker.tables, settings, cluster, load, prefetch)[1]


def largest(schema: Schema) -> Encoders:
    """Encoders with the most rows that a schema allows.

    Raises:
        UserError: a vocabulary of unknown size.
    """
    sizes = {n: t.vocabulary and t.vocabulary.max_size for n, t in schema.all_tables.items() if t.counted}
    if unknown := [name for name, limit in sizes.items() if limit is None]:
        raise UserError(
            f"table {', '.join(unknown)}: the size of its vocabulary is not known before the data is read. Set dataset=, or a "
            "bound in the schema: vocabulary: {max_size: N}."
        )
    vocabularies = {name: pa.nulls(limit) for name, limit in sizes.items()}
    bins = {name: table.bins for name, table in schema.all_tables.items() if table.bins}
    bins |= {name: feature.code_bins for name, feature in schema.features.items() if feature.code_bins}
    edges = {name: [float(edge) for edge in range(count + 1)] for name, count in bins.items()}
    return Encoders(schema, vocabularies, {}, edges)


def _bounds(schema: Schema) -> str:
    """A line that names the tables whose sizes are upper bounds."""
    names = [name for name, table in schema.all_tables.items() if table.counted or table.bins]
    return f"without a dataset, rows are upper bounds: {', '.join(names)}" if names else ""


def _summary(estimated: Estimate, config: PlanConfig) -> str:
    cluster = config.cluster
    peak = max(estimated.ranks, key=lambda rank: (rank.hbm, rank.ddr))
    hbm, ddr = cluster.available(
        estimated.dense, estimated.buffers, checkpoint_copy_bytes(estimated.dense, config.train)
    )
    used, free, memory, reserve = (peak.ddr, ddr, cluster.ddr, "")
    if cluster.device == "cuda":
        used, free, memory, reserve = (peak.hbm, hbm, cluster.hbm, f"{RESERVE:.0%} reserve, ")
    buffers = "activations and NCCL's buffers" if cluster.device == "cuda" else "activations"
    each = f" of each of {estimated.replicas} replicas" if estimated.replicas > 1 else ""
    line = (
        f"fits: peak rank {peak.rank}{each} uses {readable(used)} of {readable(free)} ({readable(memory)} less {reserve}"
        f"{readable(estimated.dense.total)} of dense parameters and {readable(estimated.buffers)} of {buffers})"
    )
    main = peak.ddr + cluster.ddr - ddr
    return line + (f", and {readable(main)} of main memory" if cluster.device == "cuda" and main else "")
