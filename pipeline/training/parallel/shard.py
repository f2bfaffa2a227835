"""Distribution, applied to a model from outside: tables sharded by a plan, the dense part replicated or sharded."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DataParallelWrapper, DefaultDataParallelWrapper
from torchrec.distributed.types import ShardedModule, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.emm import build_ranker
from models.ranker import ModelConfig, Ranker, table_weight
from models.table_storage import store_tables
from pipeline import torch_compat
from pipeline.torch_compat import ShardedTensor, table_kernels
from pipeline.training.config import Settings
from pipeline.training.optim.table_optimizers import TABLE_OPTIMIZERS
from pipeline.training.parallel import codecs, id_maps, plan
from pipeline.training.parallel.averaging import average_in_one_message
from pipeline.training.parallel.replicas import ReplicatedGroups
from pipeline.training.parallel.row_load import RowLoad

BLOCK_ROWS = 1 << 16  # rows of a table that are drawn from one random stream


class _PooledSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise on CPU too: it works there, though the stock sharder does not list it. Draws no tables."""

    def shard(self, module: EmbeddingBagCollection, *arguments: Any, **named: Any) -> ShardedEmbeddingBagCollection:
        _draw_nothing(module.embedding_bag_configs())
        return super().shard(module, *arguments, **named)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return sorted({*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value})


class _ItemSharder(EmbeddingCollectionSharder):
    """Offers no data-parallel tables on CPU: FBGEMM's kernel for them sums over a bag there, though pooling is off.

    Draws no tables.
    """

    def shard(self, module: EmbeddingCollection, *arguments: Any, **named: Any) -> ShardedEmbeddingCollection:
        _draw_nothing(module.embedding_configs())
        return super().shard(module, *arguments, **named)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [t for t in types if compute_device_type != "cpu" or t != ShardingType.DATA_PARALLEL.value]


def _draw_nothing(tables: Sequence[BaseEmbeddingConfig]) -> None:
    """What TorchRec would draw as it shards, `init_tables` or a checkpoint overwrites."""
    for table in tables:
        table.init_fn = lambda _: None


class _FullyShardedDense(DataParallelWrapper):
    """Shards everything but the tables over all ranks (FSDP): weights, gradients and the optimiser's state.

    It is one unit, whole from the forward of a step to the end of its backward: the activations of a ranker outweigh its
    dense weights. A weight is cut along the first dimension that gives all ranks as much, since the first of all is often
    the number of experts or tasks, of which there are fewer than ranks.
    """

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:  # noqa: ARG002
        """Called by TorchRec once the tables are sharded."""
        model = dmp.module.to(device)
        sharded = [module for module in model.modules() if isinstance(module, ShardedModule)]
        tables = {p for top in sharded for module in top.modules() for p in module.parameters(recurse=False)}
        mesh = init_device_mesh(device.type, (ranks := dist.get_world_size(),))

        def cut(weight: nn.Parameter) -> Shard:
            return Shard(next((dim for dim, size in enumerate(weight.shape) if size % ranks == 0), 0))

        fully_shard(model, mesh=mesh, reshard_after_forward=False, shard_placement_fn=cut, ignored_params=tables)


def unplaced(schema: Schema, encoders: Encoders, config: ModelConfig, settings: Settings) -> Ranker:
    """The ranker to train, with tables on the meta device in their number format. Raises UserError as `build_ranker`."""
    ranker = build_ranker(schema, encoders, config)
    if settings.tables.precision != "fp32":
        store_tables(ranker, settings.tables.precision)
    return ranker


def sharders(settings: Settings) -> list[Any]:
    """One for each kind of module that holds tables."""
    optimizer = TABLE_OPTIMIZERS[settings.tables.name]
    values: dict[str, Any] = {"learning_rate": settings.tables.lr}
    if "eps" in optimizer.settings:
        values["eps"] = settings.tables.eps
    if settings.tables.precision != "fp32":
        values["stochastic_rounding"] = settings.tables.rounding == "stochastic"
    arguments: dict[str, Any] = {
        "fused_params": {"optimizer": optimizer.kernel, **values},
        "qcomm_codecs_registry": codecs.codecs(settings),
    }
    return [_PooledSharder(**arguments), _ItemSharder(**arguments)]


def shard(
    model: nn.Module, ranker: Ranker, settings: Settings, device: torch.device, load: RowLoad, prefetch: bool
) -> DistributedModelParallel:
    """Shards the tables of `ranker`, a part of `model`, by a plan, and replicates or shards the rest.

    Args:
        load: of an average row, on rank 0, which makes the plan. prefetch: whether the loop fetches cached rows ahead.
    Raises:
        UserError: as `plan.plan` and `id_maps.shard_maps`; or a sharding_group that does not divide the ranks.
    """
    ranks = dist.get_world_size()
    group = settings.sharding_group or ranks
    if ranks % group:
        raise UserError(f"train.sharding_group={group} does not divide the {ranks} ranks: use a divisor, or null")
    id_maps.shard_maps(ranker, settings, device)
    table_sharders = sharders(settings)
    placed = plan.plan(model, table_sharders, ranker.tables, settings, device, load, prefetch)
    kind = DistributedModelParallel if group == ranks else partial(ReplicatedGroups, group=group)
    wrapper = (
        _FullyShardedDense() if settings.dense_parallel == "fsdp" else DefaultDataParallelWrapper(static_graph=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = kind(
            model,
            device=device,
            plan=placed,
            sharders=table_sharders,
            init_data_parallel=False,
            data_parallel_wrapper=wrapper,
        )
        if ranks == 1:  # no gradients to average
            sharded.to(device)
        else:
            sharded.init_data_parallel()
    if device.type == "cpu":  # a GPU gains more by messages that travel during the backward
        average_in_one_message(sharded)
    return sharded


@contextmanager
def whole(model: DistributedModelParallel) -> Iterator[None]:
    """Gathers the dense weights, if they are sharded, so that they can be read outside of a step; all ranks enter together."""
    sharded = [model.module] if isinstance(model.module, FSDPModule) else []
    for module in sharded:
        module.unshard()
    yield
    for module in sharded:
        module.reshard()


def set_step(model: nn.Module, step: int) -> None:
    """Restores what no state dict has of the fused kernels once a checkpoint is loaded.

    That is the number of steps that an optimiser's bias correction counts; and a GPU's cache of rows (fused_uvm_caching), which
    is emptied, and forgets what a loop that was left had fetched ahead.

    Raises:
        RuntimeError: as `table_kernels`.
    """
    counting = {optimizer.kernel for optimizer in TABLE_OPTIMIZERS.values() if optimizer.counts_steps}
    for kernel in table_kernels(model):
        kernel.reset_cache_states()
        torch_compat.forget_prefetched(kernel)
        if kernel.optimizer in counting:
            kernel.set_optimizer_step(step)


def forget_prefetched(model: nn.Module) -> None:
    """To be called before a new loop that fetches rows of cached tables ahead."""
    for kernel in table_kernels(model):
        torch_compat.forget_prefetched(kernel)


def set_table_rate(model: nn.Module, lr: float) -> None:
    """Sets the learning rate of the optimisers that are fused into the tables' backward."""
    for kernel in table_kernels(model):
        kernel.set_learning_rate(lr)


def init_tables(ranker: nn.Module, configs: Sequence[BaseEmbeddingConfig], seed: int, std: float) -> None:
    """Draws the tables' start, normal(0, std) in float32: a row depends on seed, table and row alone, not on the plan."""
    state = ranker.state_dict()
    for config in configs:
        weight = state[table_weight(config.name, isinstance(config, EmbeddingBagConfig))]
        for part, (row, column) in local_parts(weight):
            rows, columns = part.shape
            for block in range(row // BLOCK_ROWS, -(-(row + rows) // BLOCK_ROWS)):
                digest = hashlib.sha256(f"{seed}/{config.name}/{block}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                height = min(BLOCK_ROWS, config.num_embeddings - block * BLOCK_ROWS)
                drawn = torch.empty(height, config.embedding_dim).normal_(0, std, generator=generator)
                first, last = max(row, block * BLOCK_ROWS), min(row + rows, (block + 1) * BLOCK_ROWS)
                source = drawn[first - block * BLOCK_ROWS : last - block * BLOCK_ROWS, column : column + columns]
                part[first - row : last - row].copy_(source)


def local_parts(weight: torch.Tensor | ShardedTensor) -> list[tuple[torch.Tensor, list[int]]]:
    """This rank's parts of a table, each with its first row and column. A replicated table has one part."""
    if isinstance(weight, ShardedTensor):
        return [(part.tensor, part.metadata.shard_offsets) for part in weight.local_shards()]
    return [(weight, [0, 0])]
