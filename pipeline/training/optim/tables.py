"""Optimisers of embedding tables that every rank has whole; those of sharded tables are fused into the backward."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingType
from torchrec.optim.keyed import KeyedOptimizer

from pipeline.training.config import TableOptimizer

# The kernel of replicated tables on a CPU differentiates itself, and rightly so.
warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel")


class ReplicatedTables(KeyedOptimizer):
    """Updates data-parallel tables, of which every rank has a copy with the gradient's mean over the ranks.

    Mathematics, names and shapes of the state are those of the optimisers that are fused into sharded tables, so that a
    checkpoint fits either. A row that is in no batch has gradient 0, which changes neither it nor its momentum.

    Args:
        tables: by the names that they have in the model.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], config: TableOptimizer) -> None:
        state: dict[nn.Parameter, dict[str, torch.Tensor]] = {weight: {} for weight in tables.values()}
        if config.name != "sgd":
            for name, weight in tables.items():
                like = weight.detach()[:, 0] if config.name == "rowwise_adagrad" else weight.detach()
                state[weight][f"{name.split('.')[-2]}.momentum1"] = torch.zeros_like(like).contiguous()
        super().__init__(tables, state, [{"params": list(tables.values())}])  # without lr: nothing schedules it
        self.config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        """m += g^2, of a row their mean where it has one momentum; w -= lr g / (sqrt(m) + eps). SGD: w -= lr g."""
        for weight in self.params.values():
            gradient_RD = weight.grad
            if gradient_RD is None:  # of tables that are frozen
                continue
            scale_RD: torch.Tensor | float = self.config.lr
            for momentum in self.state[weight].values():
                square_RD = gradient_RD.square()
                momentum += square_RD.mean(1) if momentum.dim() == 1 else square_RD
                scale_RD = self.config.lr / (momentum.view(len(momentum), -1).sqrt() + self.config.eps)
            weight -= scale_RD * gradient_RD


def replicated_tables(model: DistributedModelParallel, config: TableOptimizer) -> ReplicatedTables:
    """The optimiser of a sharded model's data-parallel tables; it does nothing where there are none."""
    prefixes = {
        f"{path}.": {f".{table}.weight" for table, sharding in tables.items() if _replicated(sharding.sharding_type)}
        for path, tables in model.plan.plan.items()
        if isinstance(tables, EmbeddingModuleShardingPlan)
    }
    found = {
        name: weight
        for name, weight in model.named_parameters()
        for prefix, suffixes in prefixes.items()
        if name.startswith(prefix) and name.endswith(tuple(suffixes))
    }
    return ReplicatedTables(found, config)


def _replicated(sharding_type: str) -> bool:
    return sharding_type == ShardingType.DATA_PARALLEL.value
