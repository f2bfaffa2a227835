"""Which rank holds which part of which table: TorchRec's planner under the constraints of a configuration."""

import logging
import os
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.errors import UserError
from pipeline.training.config import Settings

PLACEMENTS = {"table_wise", "row_wise", "column_wise", "table_row_wise"}

logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)  # advice to library authors


def plan(
    model: nn.Module,
    sharders: list[ModuleSharder],
    tables: Sequence[BaseEmbeddingConfig],
    settings: Settings,
    device: torch.device,
) -> ShardingPlan:
    """The plan of the ranks of this process group, the same on all of them.

    Raises:
        UserError: a placement or optimiser that does not exist here, that would make results depend on the plan, or no room.
    """
    _check(settings, {table.name for table in tables}, device)
    ranks = dist.get_world_size()
    default = settings.sharding.get("default", ["table_wise", "row_wise"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=ranks,
                local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
                compute_device=device.type,
            ),
            batch_size=settings.batch_size // ranks,
            storage_reservation=FixedPercentageStorageReservation(0.15),
            constraints={
                # One id a row and feature; bags are short. Data-parallel is left out: its momentum is in no checkpoint.
                table.name: ParameterConstraints(
                    # One rank has nobody to share rows with: all placements are the same, this one is the cheapest.
                    sharding_types=settings.sharding.get(table.name, default) if ranks > 1 else ["table_wise"],
                    pooling_factors=[1.0] * len(table.feature_names),
                    compute_kernels=["fused"],
                )
                for table in tables
            },
            debug=False,
        )
        try:
            return planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
        except PlannerError as error:
            raise UserError(
                f"the tables cannot be placed on {ranks} ranks: {' '.join(str(error).split())[:300]}"
            ) from None


def _check(settings: Settings, names: set[str], device: torch.device) -> None:
    for table, placements in settings.sharding.items():
        if table != "default" and table not in names:
            raise UserError(f"train.sharding.{table}: no such table, there are {', '.join(sorted(names))}")
        if wrong := set(placements) - PLACEMENTS:
            why = " (data_parallel would lose its momentum at a checkpoint)" if "data_parallel" in wrong else ""
            raise UserError(
                f"train.sharding.{table}: {sorted(wrong)[0]} is not allowed{why}, choose from {sorted(PLACEMENTS)}"
            )
        if "column_wise" in placements and settings.tables.name == "rowwise_adagrad":
            raise UserError(
                f"train.sharding.{table}: column_wise with rowwise_adagrad keeps one momentum per column shard, so the "
                "result would depend on the plan. Use train.tables.name=adagrad, or table_wise and row_wise."
            )
        if "table_row_wise" in placements and device.type == "cpu":
            raise UserError(f"train.sharding.{table}: table_row_wise has no CPU kernel. Use table_wise or row_wise.")
    if settings.tables.name == "adam" and device.type == "cpu":
        raise UserError(
            "train.tables.name=adam: fused Adam has no CPU kernel. Use rowwise_adagrad, adagrad or sgd here."
        )
