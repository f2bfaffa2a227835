"""The optimiser of the dense part, and learning rates: functions of the step alone, so nothing of a schedule needs saving."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import KeyedOptimizer, KeyedOptimizerWrapper

from pipeline.training.optim.settings import DenseOptimizer, Schedule, TableOptimizer


def rate(config: Schedule, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) out of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    left = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return config.lr * (config.final + (1 - config.final) * left)


def table_rate(config: TableOptimizer, step: int, steps: int, epoch_steps: int) -> float:
    """The same of the tables, which is 0 once their epochs are over."""
    return 0.0 if config.epochs and step >= config.epochs * epoch_steps else rate(config, step, steps)


def build(
    config: DenseOptimizer, parameters: Iterable[tuple[str, nn.Parameter]], clip_norm: float | None
) -> KeyedOptimizer:
    """The optimiser of the dense parameters, its state made, so that a checkpoint can be loaded into it at once."""
    named = dict(parameters)

    def make(values: list[nn.Parameter]) -> torch.optim.Optimizer:
        if config.name == "adagrad":
            return torch.optim.Adagrad(values, lr=config.lr, weight_decay=config.weight_decay)
        if config.name == "sgd":
            return torch.optim.SGD(values, lr=config.lr, weight_decay=config.weight_decay, fused=True)
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
