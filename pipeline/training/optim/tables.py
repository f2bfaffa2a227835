"""The optimiser of embedding tables of which every rank has a copy; those of sharded tables are fused into the backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingType
from torchrec.optim.keyed import KeyedOptimizer

from models.ranker import is_table, table_of
from pipeline.training.optim.settings import TableOptimizer
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS
from pipeline.training.state_names import in_ranker


class ReplicatedTables(KeyedOptimizer):
    """Updates data-parallel tables, of which every rank has a copy with the gradient's mean over the ranks.

    Mathematics, names and shapes of the state are those of the fused optimisers, so that a checkpoint fits either.

    Args:
        tables: by the names that they have in the model.
        config: of an optimiser with a `change`.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], config: TableOptimizer) -> None:
        self.config, self.optimizer, self.lr = config, TABLE_OPTIMIZERS[config.name], config.lr
        state = {
            weight: {
                f"{table_of(name)}.momentum{number}": torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                for number, shape in enumerate(self.optimizer.state_shapes(*weight.shape), start=1)
            }
            for name, weight in tables.items()
        }
        super().__init__(tables, state, [{"params": list(tables.values())}])  # without lr, which the learner sets

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        """Updates all tables that have a gradient; frozen ones have none."""
        for weight in self.params.values():
            if weight.grad is not None:
                assert self.optimizer.change is not None
                weight -= self.optimizer.change(
                    weight.grad, list(self.state[weight].values()), self.lr, self.config.eps
                )


def replicated_tables(model: DistributedModelParallel, config: TableOptimizer) -> ReplicatedTables:
    """The optimiser of a sharded model's data-parallel tables; it has none to update where all tables are sharded."""
    replicated = {
        table
        for tables in model.plan.plan.values()
        if isinstance(tables, EmbeddingModuleShardingPlan)
        for table, sharding in tables.items()
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    }
    weights = {name: weight for name, weight in model.named_parameters() if is_table(in_ranker(name))}
    return ReplicatedTables({n: w for n, w in weights.items() if table_of(n) in replicated}, config)
