"""Checkpoints written to a temporary folder, checksummed and renamed into place, in the background if asked for.

Training waits only while its state is copied in memory.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from features.errors import UserError
from pipeline.run.checkpoint.lock import remove
from pipeline.run.checkpoint.manifest import CheckpointManifest, folder
from pipeline.run.checkpoint.reader import data_files
from pipeline.storage.files import sha256, storage_of, write_json
from pipeline.torch_compat import ShardedTensor, is_data_file, on_cpu, with_local


def save(
    checkpoints: Path, state: dict[str, Any], manifest: CheckpointManifest, group: dist.ProcessGroup | None = None
) -> Path:
    """Writes a checkpoint; every rank calls it with its part of the state.

    The files lie in a hidden folder until all of them and the manifest are on disk; then one rename makes it a checkpoint.

    Args:
        group: of all ranks, for the messages that this takes; the default group if None.
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
        raise UserError(f"{final}: cannot be written: {outcome[0]}. Earlier checkpoints stay.")
    return final


def _attempt(act: Any, *arguments: Any) -> Any:
    """What `act` returns, or the reason why it failed as one line: the other ranks wait for either."""
    try:
        return act(*arguments)
    except (CheckpointException, OSError, UserError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, Exception):
            raise cause from None  # an interrupt, which dcp wraps as well
        return " ".join(str(cause).split())[:300] or type(cause).__name__


def _write(staging: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, tuple[int, str]]:
    """This rank's files in `staging`: name to bytes and checksum."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(staging, sync_files=True), process_group=group)
    rank = dist.get_rank()
    ours = [p for p in staging.iterdir() if is_data_file(p.name, rank) or (rank == 0 and p.name == ".metadata")]
    return {p.name: (p.stat().st_size, sha256(p)) for p in ours}


def _commit(staging: Path, final: Path, manifest: CheckpointManifest) -> None:
    _check_complete(staging, manifest)
    write_json(staging / "manifest.json", manifest.model_dump())
    if final.exists():  # a damaged one: the run was rolled back
        remove(final, wait=True)
    storage_of(final).commit(staging, final)


def _check_complete(staging: Path, manifest: CheckpointManifest) -> None:
    """Compares the files of the manifest with those in the folder, and with those that .metadata says tensors are in.

    Raises:
        OSError: naming a file that is not in all three: a rank has written none, or torch names its files in another way.
    """
    listed, present = set(manifest.files), {path.name for path in staging.iterdir()}
    if missing := (listed ^ present) | (listed ^ (data_files(staging) | {".metadata"})):
        raise OSError(f"{sorted(missing)[0]} is not in all of manifest, folder and .metadata")


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in a thread and with a process group of its own.

    The copy's memory, that of this rank's state once more, is kept from one checkpoint to the next.

    Args:
        checkpoints: the run's folder of them.
        group: of all ranks, used by nothing else: its messages would mix with training's.
        background: False writes while the caller waits, without a copy.
        written: called in that thread with the step of a checkpoint that is on disk.
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
        """Starts to write a checkpoint; every rank calls it with its part of the state, after `wait`."""
        if not self.background:
            self._write(state, manifest)
            return
        self.copy = copy_to_cpu(state, self.copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from a GPU are under way
        self.thread = threading.Thread(target=self._write, args=(self.copy, manifest), daemon=True, name="checkpoint")
        self.thread.start()

    def wait(self) -> UserError | None:
        """Waits for the checkpoint that is being written, and returns its error; the same on all ranks."""
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
        except BaseException as error:  # raised by `wait`: a thread's error would be lost
            self.error = error


def copy_to_cpu(value: Any, into: Any = None) -> Any:
    """A copy of a state in the CPU's memory: nested dictionaries of tensors, sharded ones included.

    Args:
        into: an earlier copy of the same state, whose memory is used again.
    """
    if isinstance(value, dict):
        return {name: copy_to_cpu(item, into[name] if into else None) for name, item in value.items()}
    if isinstance(value, ShardedTensor):
        return _copied_shards(value, into)
    if isinstance(value, DTensor):
        local = copy_to_cpu(value.to_local(), into.to_local() if into is not None else None)
        return with_local(value, local)
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
    return on_cpu(value, [copy_to_cpu(shard.tensor) for shard in value.local_shards()])
