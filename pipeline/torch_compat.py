"""Private and unstable names of torch, TorchRec and FBGEMM: each stands here once, with a contract test.

tests/pipeline/test_torch_compat.py checks that a name exists and does what is relied on, and that no other file uses one.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.remote_device import _remote_device

if TYPE_CHECKING:  # a launcher uses this module too, and needs neither TorchRec nor FBGEMM's libraries of kernels
    from fbgemm_gpu.quantize_comm import QuantizedCommCodec
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
    from torch.distributed.tensor import DTensor

__all__ = ["Shard", "ShardedTensor"]

# Process groups


def set_timeout(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """Limits the collectives of a group; of the default group (dist.GroupMember.WORLD) as well."""
    distributed_c10d._set_pg_timeout(timeout, group)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """The limit of the collectives of a group on a device."""
    return group._get_backend(device).options._timeout


def default_store() -> dist.Store:
    """A new connection to the store of the default process group."""
    return clone_of(distributed_c10d._get_default_store())


def clone_of(store: dist.Store) -> dist.Store:
    """A new connection to a store."""
    return store.clone()  # type: ignore[attr-defined]


def rank_device(rank: int, device: torch.device) -> _remote_device:
    """Where a shard lies, from the metadata of a ShardedTensor."""
    return _remote_device(f"rank:{rank}/{device}")


# torchrun


class JudgedAgent(LocalElasticAgent):
    """torchrun's agent, which asks `judge` what becomes of ranks that have ended, with what it has found itself."""

    def __init__(self, judge: Callable[[RunResult], RunResult], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.judge = judge

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return self.judge(super()._monitor_workers(worker_group))


# Sharded tensors


def on_cpu(value: ShardedTensor, parts: Sequence[Tensor]) -> ShardedTensor:
    """A ShardedTensor laid out as `value`, over other tensors in main memory.

    Args:
        value: whose sizes, offsets, ranks and process group are taken. parts: one for each of its local shards.
    """
    whole = deepcopy(value.metadata())
    shards = [Shard(part, deepcopy(old.metadata)) for part, old in zip(parts, value.local_shards(), strict=True)]
    for metadata in (*whole.shards_metadata, *(shard.metadata for shard in shards)):
        if metadata.placement is not None:
            metadata.placement._device = torch.device("cpu")
    whole.tensor_properties.pin_memory = any(part.is_pinned() for part in parts)  # compared with each part's
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=whole, process_group=value._process_group
    )


def with_local(value: "DTensor", local: Tensor) -> "DTensor":
    """A DTensor laid out as `value` over another local tensor, on whatever device; from_local would move it to the mesh's."""
    from torch.distributed.tensor import DTensor

    return DTensor(local, value._spec, requires_grad=False)


# Tables


class OwnState(nn.Module):
    """A module that decides what a state dict contains of it; TorchRec's wrapper runs no hooks of state_dict."""

    def own_state(self) -> dict[str, Tensor]:
        """Tensors by name, relative to the module."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: ARG002
        destination.update({prefix + name: value for name, value in self.own_state().items()})


def table_kernels(model: nn.Module) -> "Iterator[SplitTableBatchedEmbeddingBagsCodegen]":
    """FBGEMM's modules with this rank's tables; TorchRec keeps them in lists that modules() does not look into.

    Raises:
        RuntimeError: a sharded module has fused tables on this rank and none of their kernels was found.
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
    from torchrec.distributed.types import ShardedModule

    for module in model.modules():
        lookups = getattr(module, "_lookups", ())
        kernels = [
            m for lookup in lookups for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)
        ]
        if isinstance(module, ShardedModule) and not kernels and (tables := list(module.fused_optimizer.params)):
            raise RuntimeError(
                f"{type(module).__name__}: no FBGEMM kernel found for its fused tables {', '.join(tables)}. TorchRec has "
                "changed: the optimiser's step could not be restored. Adapt pipeline/torch_compat.py."
            )
        yield from kernels


def forget_prefetched(kernel: "SplitTableBatchedEmbeddingBagsCodegen") -> None:
    """Readies it for a new loop that fetches rows ahead.

    Drops the places in the cache of a batch that was fetched and never trained on, which the next one would get; and the stream
    of the loop before, which it would wait for in place of the new one's.
    """
    kernel.prefetch_stream = None
    kernel.timesteps_prefetched.clear()
    kernel.lxu_cache_locations_list.clear()
    kernel.lxu_cache_locking_counter.zero_()


def precision(codec: "QuantizedCommCodec") -> Any:
    """The number format that a codec of TorchRec was made for."""
    return codec._comm_precision


# Programs


def compile_program(program: torch.export.ExportedProgram, path: Path, march: str | None) -> None:
    """Writes an AOTInductor package of a program.

    Args:
        march: the kind of processor as the C++ compiler names it; None: of this very one.
    Raises:
        RuntimeError: it cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package, config  # takes seconds, and only this needs it

    settings: dict[str, Any] = {"cpp.dynamic_threads": True}  # torch.set_num_threads where it runs, not of this process
    if march and hasattr(config.cpp, "march"):  # earlier releases compile for this very processor
        settings["cpp.march"] = march
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 copies what it deprecates itself
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


# Gradients


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """The Euclidean norm of each tensor, as scalars, in few kernel launches."""
    return torch._foreach_norm(tensors) if tensors else []
