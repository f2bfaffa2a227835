"""Distribution, applied to a model from outside: process group, sharding plan, tables' start."""

import hashlib
import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from features.errors import UserError
from models.ranker import Ranker
from pipeline.memory import keep_memory
from pipeline.training import planning
from pipeline.training.config import Settings

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


def start() -> torch.device:
    """Joins the process group that torchrun describes, or makes one of a single process; returns this rank's device."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cpu":
        keep_memory()
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(minutes=10)
    if device.type == "cuda":
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(f"more ranks than this machine's {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return device
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return device
    # All attempts of torchrun share one store: without a prefix a restart meets the addresses of dead ranks.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", dist.TCPStore(host, port, ranks, is_master=False))
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    return device


class _Sharder(EmbeddingBagCollectionSharder):
    """Offers row-wise on CPU too: it works there, though the stock sharder does not list it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return sorted({*super().sharding_types(compute_device_type), ShardingType.ROW_WISE.value})


def shard(model: nn.Module, ranker: Ranker, settings: Settings, device: torch.device) -> DistributedModelParallel:
    """Shards the tables of `ranker`, a part of `model`, by a plan, and replicates the rest.

    Raises:
        UserError: as pipeline.training.planning.plan.
    """
    sharder = _Sharder(
        fused_params={
            "optimizer": OPTIMIZERS[settings.tables.name],
            "learning_rate": settings.tables.lr,
            "eps": settings.tables.eps,
        }
    )
    plan = planning.plan(model, [sharder], ranker.embeddings.embedding_bag_configs(), settings, device)
    alone = dist.get_world_size() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = DistributedModelParallel(
            model,
            device=device,
            plan=plan,
            sharders=[sharder],
            init_data_parallel=False,
            # One rank has nobody to average with.
            data_parallel_wrapper=None if alone else DefaultDataParallelWrapper(static_graph=True),
        )
        if alone:
            sharded.to(device)
        else:
            sharded.init_data_parallel()
    return sharded


def set_step(model: nn.Module, step: int) -> None:
    """Tells fused Adam how many steps it has taken: its bias correction is in no state dict."""
    for module in model.modules():
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and module.optimizer == EmbOptimType.ADAM:
            module.set_optimizer_step(step)


def init_tables(embeddings: nn.Module, configs: list[EmbeddingBagConfig], seed: int, std: float) -> None:
    """Draws the tables' start, normal(0, std): a row's values depend on seed, table and row alone, not on the plan."""
    for config in configs:
        weight = embeddings.state_dict()[f"embedding_bags.{config.name}.weight"]
        for part in weight.local_shards():
            (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
            for block in range(row // BLOCK_ROWS, -(-(row + rows) // BLOCK_ROWS)):
                digest = hashlib.sha256(f"{seed}/{config.name}/{block}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
                height = min(BLOCK_ROWS, config.num_embeddings - block * BLOCK_ROWS)
                drawn = torch.empty(height, config.embedding_dim).normal_(0, std, generator=generator)
                first, last = max(row, block * BLOCK_ROWS), min(row + rows, (block + 1) * BLOCK_ROWS)
                source = drawn[first - block * BLOCK_ROWS : last - block * BLOCK_ROWS, column : column + columns]
                part.tensor[first - row : last - row].copy_(source)
