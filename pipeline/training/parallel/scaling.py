"""How training scales: step time and rows/s of a model on 1, 2, 4, ... ranks of a kind, and whether its tables fit."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
from tabulate import tabulate
from torchrec import EmbeddingBagConfig
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.batch import id_type
from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.lanes import check_sizes
from pipeline.training.config import Settings
from pipeline.training.optim import weighting
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.hardware import Kind, Link
from pipeline.training.parallel.row_load import RowLoad, activation_bytes, flops_per_row, ids_per_row
from pipeline.training.parallel.step_time import Part, Step, Table, step_time
from pipeline.training.parallel.topology import Cluster
from pipeline.training.step import TrainStep

logger = logging.getLogger(__name__)
REPORT_S = 5.0  # between lines that report how far the planning is
NUMBER = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes
UNLIMITED = 1 << 60
HEAD = [
    "ranks",
    "nodes",
    "rows a rank",
    "step ms",
    "compute",
    "tables",
    "exchange",
    "all-reduce",
    "rows/s",
    "efficiency",
]


@dataclass(frozen=True)
class Model:
    """What a step time depends on of a model.

    Attributes:
        step: its parts, with tables on the meta device. tables: of all.
        load: of an average row. flops: of a row, forward and backward. dense: parameters outside of the tables.
        rows: of the train split; None without a dataset.
        id_bytes: of an id. notes: what is guessed of it.
    """

    step: TrainStep
    tables: Sequence[BaseEmbeddingConfig]
    load: RowLoad
    flops: float
    dense: int
    rows: int | None
    id_bytes: int
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls, schema: Schema, encoders: Encoders, config: ModelConfig, settings: Settings, dataset: Dataset | None = None
    ) -> "Model":
        """Of a configuration; without a dataset the lengths of lists are guessed."""
        ranker = shard.unplaced(schema, encoders, config, settings)
        step = TrainStep(ranker, weighting.task_loss(settings.weighting, schema.tasks, settings.seed), bf16=False)
        ids, notes = ids_per_row(schema, dataset)
        load = RowLoad(ids, activation_bytes(schema, encoders, config, settings.precision == "bf16"))
        dense = sum(p.numel() for p in step.dense_parameters())
        rows = dataset.manifest.rows["train"] if dataset else None
        id_bytes, flops = np.dtype(id_type(schema)).itemsize, flops_per_row(schema, encoders, config)
        return cls(step, ranker.tables, load, flops, dense, rows, id_bytes, notes)


def step_of(placed: ShardingPlan, model: Model, settings: Settings, cluster: Cluster) -> Step:
    """The step of a model whose tables are placed so."""
    optimizer, group = TABLE_OPTIMIZERS[settings.tables.name], settings.sharding_group or cluster.ranks
    by_name = {
        config.name: Table(
            config.num_embeddings,
            config.embedding_dim,
            len(config.feature_names),
            sum(model.load.ids[feature] for feature in config.feature_names),
            isinstance(config, EmbeddingBagConfig),
            optimizer.state_bytes(1, config.embedding_dim),
            NUMBER[settings.tables.precision],
        )
        for config in model.tables
    }
    parts = []
    for module in placed.plan.values():
        for name, sharding in module.items():
            table, spec = by_name[name], sharding.sharding_spec
            sizes = [(s.placement.rank(), *s.shard_sizes) for s in spec.shards] if spec else []
            if sharding.sharding_type == "data_parallel":
                sizes = [(rank, table.rows, table.dim) for rank in range(group)]
            parts += [Part(table, sharding.sharding_type, rank, rows, columns) for rank, rows, columns in sizes]
    return Step(
        ranks=cluster.ranks,
        ranks_per_node=min(cluster.ranks_per_node, cluster.ranks),
        group=group,
        rows=-(-settings.order(cluster.ranks).batch_size // cluster.ranks),
        parts=parts,
        flops=model.flops,
        dense=model.dense,
        id_bytes=model.id_bytes,
        forward=NUMBER[settings.communication.forward],
        backward=NUMBER[settings.communication.backward],
        sync_every=settings.sync_every,
        precision=settings.precision,
        pipelined=settings.is_pipelined(cluster.device, model.step.ranker.managed is not None),
        gloo=cluster.device == "cpu",
    )


def placed_step(model: Model, settings: Settings, cluster: Cluster) -> tuple[Step, bool]:
    """The step on a cluster, and whether it fits there; one that does not is placed as if memory were unlimited.

    Raises:
        UserError: as plan.place, but for memory.
    """
    fits = True
    try:
        placed, _ = plan.place(model.step, shard.sharders(settings), model.tables, settings, cluster, model.load)
    except UserError:
        fits, unlimited = False, replace(cluster, hbm=min(cluster.hbm, 1) * UNLIMITED, ddr=UNLIMITED)
        placed, _ = plan.place(model.step, shard.sharders(settings), model.tables, settings, unlimited, model.load)
    return step_of(placed, model, settings, cluster), fits


def scaling_report(
    model: Model,
    settings: Settings,
    cluster: Cluster,
    kind: Kind,
    link: Link,
    counts: Sequence[int],
) -> list[str]:
    """Step time and rows/s for each number of ranks, and what was assumed, in lines.

    Args:
        settings: with rank_batch_size each rank has as many rows at any number of them, else batch_size is shared.
        cluster: memory and ranks of a node.
    """
    cells, left_out, reported = [], [], monotonic()
    alone, _ = placed_step(model, _on(1, settings, cluster), replace(cluster, ranks=1))
    alone_rate = alone.rows / step_time(alone, kind, link).total
    for number, ranks in enumerate(counts):
        if monotonic() - reported > REPORT_S:
            logger.info(f"planned {number} of {len(counts)} numbers of ranks; next: {ranks} ranks")
            reported = monotonic()
        try:
            chosen = _on(ranks, settings, cluster)
            step, fits = placed_step(model, chosen, replace(cluster, ranks=ranks))
        except UserError as error:
            left_out.append(f"{ranks} ranks left out: {error}")
            continue
        time, batch = step_time(step, kind, link), chosen.order(ranks).batch_size
        rate = batch / time.total  # rows that pad a rank's part of the batch take time and train nothing
        parts = (time.total, time.compute, time.tables, time.exchange, time.all_reduce)
        row = [
            str(ranks),
            str(-(-ranks // cluster.ranks_per_node)),
            f"{step.rows:,}",
            *(f"{1e3 * s:,.2f}" for s in parts),
        ]
        row += [f"{rate:,.0f}", f"{rate / ranks / alone_rate:.1%}"]
        rows = min((model.rows or 0) * settings.epochs, (settings.max_steps or UNLIMITED) * batch)
        row += [f"{rows / rate / 3600:,.2f}"] if model.rows else []
        cells.append([*row, "yes" if fits else "no"])
    head = [*HEAD, *(["hours"] if model.rows else []), "fits"]
    table = tabulate(cells, head, "plain", disable_numparse=True, colalign=["right"] * len(head))
    return [*table.splitlines(), *left_out, *_assumptions(model, settings, alone, kind, link)]


def _on(ranks: int, settings: Settings, cluster: Cluster) -> Settings:
    """The settings for a number of ranks. Raises UserError where it does not go with them."""
    order = settings.order(ranks)
    check_sizes(order.batch_size, order.lanes, ranks)
    if ranks > cluster.ranks_per_node and ranks % cluster.ranks_per_node:
        raise UserError(f"no multiple of ranks_per_node={cluster.ranks_per_node}")
    return settings.model_copy(update={"sharding_group": None if ranks == 1 else settings.sharding_group})


def _assumptions(model: Model, settings: Settings, step: Step, kind: Kind, link: Link) -> list[str]:
    """What the times follow from; guesses are called so."""
    ids = "ids travel while the batch before is trained on" if step.pipelined else "ids are waited for"
    gradients = (
        "all but the last 25 MiB of dense gradients travel"
        if kind.memory
        else "dense gradients of 3 ranks and more do not travel"
    )
    cached = any("fused_uvm_caching" in kernels for kernels in settings.kernels.values())
    more = settings.weighting.refuses.get("pipelined") is not None
    return [
        f"{'public' if kind.memory else 'guessed'}: {kind.name}, "
        f"{kind.flops[settings.precision] / 1e12:,.4g} TFLOP/s ({settings.precision}), "
        f"{kind.memory_bandwidth / 1e9:,.0f} GB/s of memory, {kind.link / 1e9:,.0f} GB/s to ranks of the node; "
        f"{link.name} of a node to others",
        f"guessed: {kind.flops_share:.0%} of the FLOP/s, {kind.bandwidth_share:.0%} of the memory's, {kind.link_share:.0%} of "
        f"the node's and {link.share:.0%} of the network's rate; {1e3 * kind.host:g} ms to launch a step's kernels; "
        f"{1e6 * link.node_latency:g} us latency within a node, {1e6 * link.latency:g} between nodes",
        f"counted: {model.flops:,.0f} FLOPs a row forward and backward, {model.dense:,} dense parameters",
        f"assumed: {ids}; {gradients} during the backward; every row of a table is as frequent; each id is read and updated by "
        "itself; reading of the dataset and checkpoints take no time",
        *model.notes,
        *(["too fast: tables with fused_uvm_caching are timed as if they lay in GPU memory"] if cached else []),
        *([f"too fast: train.weighting={settings.weighting.name} has more backwards than one"] if more else []),
    ]
