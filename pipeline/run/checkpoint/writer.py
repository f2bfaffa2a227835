"""Checkpoints written to a temporary folder, checksummed and renamed into place, in the background if wanted.

Training waits only while its state is copied in memory.
"""

import shutil
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from features.errors import UserError
from pipeline.run.checkpoint.lock import remove
from pipeline.run.checkpoint.manifest import CheckpointManifest, folder
from pipeline.storage.files import sha256, storage_of, write_json


def save(
    checkpoints: Path, state: dict[str, Any], manifest: CheckpointManifest, group: dist.ProcessGroup | None = None
) -> Path:
    """Writes a checkpoint; every rank calls it with its part of the state.

    The files lie in a hidden folder until all of them and the manifest are on disk; then one rename makes it a checkpoint.

    Args:
        group: of all ranks, for what they tell each other; the default group if None.
    Raises:
        UserError: on every rank, if one cannot write, as on a full disk; the checkpoints before it stay.
    """
    final = folder(checkpoints, manifest.step)
    staging = final.with_name(f".{final.name}")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    dist.barrier(group)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, _attempt(_write, staging, state, group), group)
    outcome = [next((part for part in parts if isinstance(part, str)), None)]
    if rank == 0 and outcome[0] is None:
        files = {name: entry for part in parts for name, entry in part.items()}
        outcome = [_attempt(_commit, staging, final, manifest.sealed(files))]
    dist.broadcast_object_list(outcome, group=group)
    if outcome[0] is not None:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{final}: cannot be written: {outcome[0]}. Make room; the run goes on from the one before.")
    return final


def _attempt(act: Any, *arguments: Any) -> Any:
    """What `act` returns, or a line that says why it could not: the other ranks wait to hear it either way."""
    try:
        return act(*arguments)
    except (CheckpointException, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, Exception):
            raise cause from None  # an interrupt, which dcp wraps as well
        return " ".join(str(cause).split())[:300] or type(cause).__name__


def _write(staging: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, tuple[int, str]]:
    """This rank's files in `staging`: name to bytes and checksum."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(staging, sync_files=True), process_group=group)
    rank = dist.get_rank()
    ours = [p for p in staging.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and p.name == ".metadata")]
    return {p.name: (p.stat().st_size, sha256(p)) for p in ours}


def _commit(staging: Path, final: Path, manifest: CheckpointManifest) -> None:
    write_json(staging / "manifest.json", manifest.model_dump())
    if final.exists():  # a damaged one: the run was rolled back
        remove(final, wait=True)
    storage_of(final).commit(staging, final)


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread and with a process group of its own.

    The copy's memory, that of this rank's state once more, is kept from one checkpoint to the next.

    Args:
        checkpoints: the run's folder of them.
        group: of all ranks, used by nothing else: its messages would mix with training's.
        background: False writes while the caller waits, without a copy.
        written: called in that thread with the step whose checkpoint is on disk.
    """

    def __init__(
        self,
        checkpoints: Path,
        group: dist.ProcessGroup | None,
        background: bool,
        written: Callable[[int], None],
    ) -> None:
        self.checkpoints, self.group, self.background, self.written = checkpoints, group, background, written
        self.copy: Any = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, state: dict[str, Any], manifest: CheckpointManifest) -> None:
        """Begins to write a checkpoint; every rank calls it with its part of the state, after `wait`."""
        if not self.background:
            self._write(state, manifest)
            return
        self.copy = copied(state, self.copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from a GPU are under way
        self.thread = threading.Thread(target=self._write, args=(self.copy, manifest), daemon=True, name="checkpoint")
        self.thread.start()

    def wait(self) -> UserError | None:
        """Waits until nothing is being written, and returns why the last checkpoint could not be; the same on all ranks."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def _write(self, state: dict[str, Any], manifest: CheckpointManifest) -> None:
        try:
            save(self.checkpoints, state, manifest, self.group)
            self.written(manifest.step)
        except BaseException as error:  # a thread's error would go unseen
            self.error = error


def copied(value: Any, into: Any = None) -> Any:
    """A copy of a state in the CPU's memory: nested dictionaries of tensors, sharded ones included.

    Args:
        into: an earlier copy of the same state, whose memory is used again.
    """
    if isinstance(value, dict):
        return {name: copied(item, into[name] if into else None) for name, item in value.items()}
    if isinstance(value, ShardedTensor):
        return _copied_shards(value, into)
    if isinstance(value, DTensor):
        local = copied(value.to_local(), into.to_local() if into is not None else None)
        return DTensor(local, value._spec, requires_grad=False)  # from_local would move it back to the GPU
    if isinstance(value, Tensor):
        if into is None:
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value.detach(), non_blocking=True)
    return value


def _copied_shards(value: ShardedTensor, into: ShardedTensor | None) -> ShardedTensor:
    if into is not None:
        for theirs, ours in zip(value.local_shards(), into.local_shards(), strict=True):
            ours.tensor.copy_(theirs.tensor.detach(), non_blocking=True)
        return into
    whole = deepcopy(value.metadata())
    shards = [Shard(copied(shard.tensor), deepcopy(shard.metadata)) for shard in value.local_shards()]
    for metadata in (*whole.shards_metadata, *(shard.metadata for shard in shards)):
        if metadata.placement is not None:
            metadata.placement._device = torch.device("cpu")
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=whole, process_group=value._process_group
    )
