"""Distribution, applied to a model from outside: tables sharded by a plan, the dense part replicated or sharded."""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DataParallelWrapper, DefaultDataParallelWrapper
from torchrec.distributed.types import ShardedModule, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from features.errors import UserError
from models.ranker import Ranker
from pipeline.training.config import Settings
from pipeline.training.parallel import codecs, id_maps, plan
from pipeline.training.parallel.replicas import CopiedTables

OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}
BLOCK_ROWS = 1 << 16
for name in ("torchrec.distributed.utils", "torchrec.distributed.model_parallel"):
    logging.getLogger(name).setLevel(logging.ERROR)  # advice to library authors
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


class _Sharder(EmbeddingBagCollectionSharder):
    """Offers row-wise on CPU too: it works there, though the stock sharder does not list it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return sorted({*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value})


class _ItemSharder(EmbeddingCollectionSharder):
    """Offers no data-parallel tables on CPU: FBGEMM's kernel for them pools there, though it is told not to."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        return [t for t in types if compute_device_type != "cpu" or t != ShardingType.DATA_PARALLEL.value]


class _Shards(DataParallelWrapper):
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


def sharders(settings: Settings) -> list[Any]:
    """One for each kind of module that holds tables."""
    how: dict[str, Any] = {
        "fused_params": {
            "optimizer": OPTIMIZERS[settings.tables.name],
            "learning_rate": settings.tables.lr,
            "eps": settings.tables.eps,
        },
        "qcomm_codecs_registry": codecs.codecs(settings),
    }
    return [_Sharder(**how), _ItemSharder(**how)]


def shard(model: nn.Module, ranker: Ranker, settings: Settings, device: torch.device) -> DistributedModelParallel:
    """Shards the tables of `ranker`, a part of `model`, by a plan, and replicates or shards the rest.

    Raises:
        UserError: as pipeline.training.planning.plan and pipeline.training.managed.share_out; or a group of ranks that does
            not divide them.
    """
    ranks = dist.get_world_size()
    group = settings.sharding_group or ranks
    if ranks % group:
        raise UserError(
            f"train.sharding_group={group} does not divide the {ranks} ranks of this run: take a divisor, or leave it out"
        )
    id_maps.share_out(ranker, settings, device)
    how = sharders(settings)
    placed = plan.plan(model, how, ranker.tables, settings, device)
    kind = DistributedModelParallel if group == ranks else partial(CopiedTables, group=group)
    wrapper = _Shards() if settings.dense_parallel == "fsdp" else DefaultDataParallelWrapper(static_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = kind(
            model,
            device=device,
            plan=placed,
            sharders=how,
            init_data_parallel=False,
            data_parallel_wrapper=wrapper,
        )
        if ranks == 1:  # nobody to average with
            sharded.to(device)
        else:
            sharded.init_data_parallel()
    return sharded


@contextmanager
def whole(model: DistributedModelParallel) -> Iterator[None]:
    """Within it the dense weights can be read outside of a step, sharded or not; all ranks enter it together."""
    sharded = [model.module] if isinstance(model.module, FSDPModule) else []
    for module in sharded:
        module.unshard()
    yield
    for module in sharded:
        module.reshard()


def set_step(model: nn.Module, step: int) -> None:
    """Tells fused kernels that a checkpoint was loaded.

    Adam's bias correction is in no state dict; and rows that a GPU caches (fused_uvm_caching) are those of before.
    """
    for kernel in kernels(model):
        kernel.reset_cache_states()
        if kernel.optimizer == EmbOptimType.ADAM:
            kernel.set_optimizer_step(step)


def kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules with this rank's tables; TorchRec keeps them in lists that modules() does not look into."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            yield from (m for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen))


def init_tables(model: nn.Module, configs: Sequence[BaseEmbeddingConfig], seed: int, std: float) -> None:
    """Draws the tables' start, normal(0, std): a row's values depend on seed, table and row alone, not on the plan."""
    state = model.state_dict()
    for config in configs:
        ends = (f"embedding_bags.{config.name}.weight", f"embeddings.{config.name}.weight")
        weight = next(value for name, value in state.items() if name.endswith(ends))
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
    """What this rank holds of a table: parts, each with the row and column where it begins. A replicated table is one."""
    if isinstance(weight, ShardedTensor):
        return [(part.tensor, part.metadata.shard_offsets) for part in weight.local_shards()]
    return [(weight, [0, 0])]
