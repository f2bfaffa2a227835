"""Optimisers beside those that are fused into the tables: of the dense part, whose learning rate is a function of the step
alone so that nothing of a schedule needs saving, and of tables that every rank has whole."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingType
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper

from pipeline.training.config import DenseOptimizer, TableOptimizer

# The kernel of replicated tables on a CPU differentiates itself, and rightly so.
warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel")


def rate(config: DenseOptimizer, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) out of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    left = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return config.lr * (config.final + (1 - config.final) * left)


def build(
    config: DenseOptimizer, parameters: Iterable[tuple[str, nn.Parameter]], clip_norm: float | None
) -> KeyedOptimizer:
    """The optimiser of the dense parameters, its state made, so that a checkpoint can be loaded into it at once."""
    named = dict(parameters)

    def make(values: list[nn.Parameter]) -> torch.optim.Optimizer:
        if config.name == "adagrad":
            return torch.optim.Adagrad(values, lr=config.lr, weight_decay=config.weight_decay)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
        # One kernel for all parameters: the default loops over them.
        return kind(values, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    optimizer: KeyedOptimizer = KeyedOptimizerWrapper(named, make)
    # It makes the state by a step with gradients of 0: that must not decay a weight, nor count among Adam's steps.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.init_state()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    for group in optimizer.param_groups:
        group["lr"] = config.lr
    if clip_norm is None:
        return optimizer
    # Without their groups TorchRec would take shards for whole parameters, and clip none.
    shards = {p: [p.device_mesh.get_group()] for p in named.values() if isinstance(p, DTensor)}
    return GradientClippingOptimizer(
        optimizer,
        clipping=GradientClipping.NORM,
        max_gradient=clip_norm,
        enable_global_grad_clip=bool(shards),
        param_to_pgs=shards,
    )


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
