"""Whether a model's tables fit on a cluster that is not here, and where they would go."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import ByteSize, Field, model_validator

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.emm import EMMSettings, build_ranker
from models.ranker import ModelConfig
from pipeline.dataset.dataset import open_dataset
from pipeline.training.config import Settings, Strict
from pipeline.training.optim import weighting
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.memory import Estimate, size
from pipeline.training.parallel.plan import FREE, Cluster
from pipeline.training.step import TrainStep

UNLIMITED = 1 << 60


class PlanConfig(Strict):
    """What jobs.train would be given, and the cluster.

    Attributes:
        dataset: whose fitted encoders say how large tables are; without it the schema says how large they can be.
        run, resume: of jobs.train, so that its command line can be taken as it is; nothing is read or written there.
        ranks: of the cluster. ranks_per_node: on each machine.
        hbm: of each rank's GPU. ddr: main memory for each rank. Both in bytes, or as 80GB, 80GiB.
    """

    dataset: Path | None = None
    days: str | None = None
    tasks: list[str] | None = None
    run: Path | None = None
    resume: str = "auto"
    model: ModelConfig
    train: Settings
    ranks: int = Field(ge=1)
    ranks_per_node: int = Field(8, ge=1)
    device: Literal["cuda", "cpu"] = "cuda"
    hbm: ByteSize | None = None
    ddr: ByteSize | None = None

    @model_validator(mode="after")
    def _memory_that_counts(self) -> "PlanConfig":
        needed, example = ("hbm", "80GB") if self.device == "cuda" else ("ddr", "16GB")
        if getattr(self, needed) is None:
            raise ValueError(
                f"{needed} is missing: on {self.device} say how much memory a rank has, as {needed}={example}"
            )
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise ValueError(f"ranks={self.ranks} is no multiple of ranks_per_node={self.ranks_per_node}")
        if getattr(self, needed) < 1 << 20:
            raise ValueError(f"{needed}={getattr(self, needed)} is less than a megabyte: say {needed}={example}")
        if self.train.batch_size % self.train.lanes:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is no multiple of train.lanes={self.train.lanes}"
            )
        if self.train.batch_size % self.ranks:
            raise ValueError(f"train.batch_size={self.train.batch_size} is no multiple of ranks={self.ranks}")
        return self

    @property
    def cluster(self) -> Cluster:
        """As the planner takes it."""
        return Cluster(
            self.ranks,
            min(self.ranks, self.ranks_per_node),
            self.device,
            int(self.hbm or 0) if self.device == "cuda" else 0,
            int(self.ddr or UNLIMITED),
        )


def answer(config: PlanConfig, schema: Schema | None) -> list[str]:
    """What jobs.plan says of tables that fit.

    Args:
        schema: if given with a dataset, the dataset must have been written for it.
    Raises:
        UserError: tables that do not fit, or whose size nobody can know; settings that contradict each other.
    """
    if config.dataset:
        dataset = open_dataset(config.dataset, config.days)
        if schema is not None:
            dataset.check_compatible(schema.fingerprint, "the schema of this job")
        dataset = dataset.only(config.tasks)
        schema, encoders, bounds = dataset.schema, dataset.encoders, ""
    elif schema is not None:
        schema = schema.only(config.tasks)
        encoders, bounds = largest(schema), _bounds(schema)
    else:
        raise UserError("say dataset=PATH, whose tables are to be placed, or data=NAME for the tables of a schema")
    if config.model.fusion.get("name") == "emm" and not EMMSettings.of(config.model).sources:
        raise UserError(
            "model=emm takes its tables from trained runs (model.from): plan the models that it is fused from"
        )
    ranker, settings = build_ranker(schema, encoders, config.model), config.train
    model = TrainStep(ranker, weighting.task_loss(settings, schema.tasks), bf16=False)
    _, estimated = plan.place(model, shard.sharders(settings), ranker.tables, settings, config.cluster)
    notes = [bounds] if bounds else []
    if settings.lanes % config.ranks:
        notes.append(
            f"to train there, say train.lanes={config.ranks} or a multiple: lanes={settings.lanes} is none of the ranks"
        )
    return [*estimated.lines(), *notes, _summary(estimated, config.cluster)]


def largest(schema: Schema) -> Encoders:
    """Encoders of the most rows that a schema allows.

    Raises:
        UserError: a vocabulary of no known size.
    """
    sizes = {n: t.vocabulary and t.vocabulary.max_size for n, t in schema.all_tables.items() if t.counted}
    if unknown := [name for name, limit in sizes.items() if limit is None]:
        raise UserError(
            f"table {', '.join(unknown)}: how many values its vocabulary will hold is not known before the data is read. Give "
            "dataset=, or a bound: vocabulary: {max_size: N} in the schema."
        )
    vocabularies = {name: pa.nulls(limit) for name, limit in sizes.items()}
    bins = {name: table.bins for name, table in schema.all_tables.items() if table.bins}
    bins |= {name: feature.code_bins for name, feature in schema.features.items() if feature.code_bins}
    edges = {name: [float(edge) for edge in range(count + 1)] for name, count in bins.items()}
    return Encoders(schema, vocabularies, {}, edges)


def _bounds(schema: Schema) -> str:
    """Which sizes are only bounds."""
    names = [name for name, table in schema.all_tables.items() if table.counted or table.bins]
    return f"without a dataset, rows are the most there can be: {', '.join(names)}" if names else ""


def _summary(estimated: Estimate, cluster: Cluster) -> str:
    fullest = max(estimated.ranks, key=lambda rank: (rank.hbm, rank.ddr))
    room = cluster.room(estimated.dense)
    used, free, kept = (
        (fullest.hbm, room[0], f", {FREE:.0%} kept free") if cluster.device == "cuda" else (fullest.ddr, room[1], "")
    )
    copies = f" in each of {estimated.copies} copies" if estimated.copies > 1 else ""
    line = (
        f"fits: rank {fullest.rank} is the fullest{copies}, with {size(used)} of tables and their batches of the {size(free)} "
        f"that {size(estimated.dense.total)} of dense part leave{kept}"
    )
    return line + (f"; {size(fullest.ddr)} in main memory" if cluster.device == "cuda" and fullest.ddr else "")
