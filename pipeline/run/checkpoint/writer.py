"""Checkpoints written to a temporary folder, checksummed and renamed into place, in the background if asked for.

Training waits only while its state is copied in memory.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from features.errors import UserError, one_line
from pipeline.run.checkpoint.index import ALIGNMENT, Index, Part, TensorEntry, read_index
from pipeline.run.checkpoint.lock import discard, remove
from pipeline.run.checkpoint.manifest import INDEX, CheckpointManifest, folder
from pipeline.run.checkpoint.staging import Staging
from pipeline.storage.files import storage_of, write_json, write_text
from pipeline.torch_compat import ShardedTensor, on_cpu, with_local


def save(
    checkpoints: Path, state: dict[str, Any], manifest: CheckpointManifest, group: dist.ProcessGroup | None = None
) -> Path:
    """Writes a checkpoint; every rank calls it with its part of the state.

    The files lie in a hidden folder until all of them and the manifest are on disk; then one rename makes it a checkpoint.

    Args:
        state: nested dictionaries of tensors. group: of all ranks, for the messages that this takes; the default group if None.
    Raises:
        UserError: on every rank, if one cannot write, as on a full disk; the checkpoints before it stay.
    """
    final = folder(checkpoints, manifest.step)
    staging = final.with_name(f".{final.name}")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    outcome: list[Any] = [None]
    if rank == 0:
        outcome = [_attempt(_begin, staging)]
    dist.broadcast_object_list(outcome, group=group)
    if outcome[0] is None:
        parts: list[Any] | None = [None] * ranks if rank == 0 else None
        dist.gather_object(_attempt(_write, staging, state, group), parts, group=group)
        if parts is not None:
            failed = next((part for part in parts if isinstance(part, str)), None)
            files = {} if failed else {name: entry for part in parts for name, entry in part.items()}
            outcome = [failed or _attempt(_commit, staging, final, manifest.sealed(files))]
    dist.broadcast_object_list(outcome, group=group)
    if outcome[0] is not None:
        if rank == 0:
            discard(staging)
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
        return one_line(cause)


def _begin(staging: Path) -> None:
    """A new folder: what a killed writer left is removed, and a link there is not followed."""
    discard(staging)
    staging.mkdir(parents=True)


def _write(staging: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, tuple[int, str]]:
    """This rank's files in `staging`: name to bytes and checksum."""
    writer = _Writer(staging, dist.get_rank())
    dcp.save(state, storage_writer=writer, process_group=group)
    return writer.files


def _commit(staging: Path, final: Path, manifest: CheckpointManifest) -> None:
    write_json(staging / "manifest.json", manifest.model_dump())
    _check_complete(staging, manifest)
    if final.exists():  # a damaged one: the run was rolled back
        remove(final, wait=True)
    storage_of(final).commit(staging, final)


def _check_complete(staging: Path, manifest: CheckpointManifest) -> None:
    """Compares the files of the manifest with those in the folder, and with those that the index says tensors are in.

    Raises:
        OSError: naming a file that is not in all three.
        UserError: the index does not fit them.
    """
    listed, present = set(manifest.files) | {"manifest.json"}, {path.name for path in staging.iterdir()}
    indexed = {part.file for entry in read_index(staging, manifest).tensors.values() for part in entry.parts}
    if missing := (listed ^ present) | (listed ^ (indexed | {INDEX, "manifest.json"})):
        raise OSError(f"{sorted(missing)[0]} is not in all of manifest, folder and index")


def data_file(rank: int) -> str:
    """The name of the file with what a rank has written of the tensors."""
    return f"rank-{rank:05d}.bin"


class _Writer(dcp.StorageWriter):
    """Writes a rank's parts of the tensors one after the other, and on rank 0 the index of all ranks' parts.

    Which rank writes what is torch.distributed.checkpoint's plan.

    Attributes:
        files: what was written: name to bytes and checksum, taken of the content on its way.
    """

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self.path, self.rank, self.staging = path, rank, Staging()
        self.files: dict[str, tuple[int, str]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, name, checksum = [], data_file(self.rank), hashlib.sha256()
        if plan.items:
            with (self.path / name).open("xb") as file:
                for item in plan.items:
                    if item.type == WriteItemType.BYTE_IO:
                        raise TypeError(f"{item.index.fqn} is no tensor: a checkpoint holds nothing else")
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    start = _write_aligned(file, checksum, self.staging.pieces(tensor))
                    part = Part(offsets=[], sizes=list(tensor.size()), file=name, start=start)
                    results.append(WriteResult(item.index, tensor.nbytes, part))
                self.files[name] = file.tell(), checksum.hexdigest()
                file.flush()
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        parts: dict[str, list[Part]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            offsets = list(result.index.offset or [0] * len(result.storage_data.sizes))
            parts[result.index.fqn].append(result.storage_data.model_copy(update={"offsets": offsets}))
        tensors = {
            name: TensorEntry(
                dtype=str(kind.properties.dtype).removeprefix("torch."), shape=list(kind.size), parts=parts[name]
            )
            for name, kind in metadata.state_dict_metadata.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        content = Index(tensors=tensors).model_dump_json()
        write_text(self.path / INDEX, content)
        self.files[INDEX] = len(content.encode()), hashlib.sha256(content.encode()).hexdigest()

    def set_up_storage_writer(self, *_: Any, **__: Any) -> None: ...

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return True


def _write_aligned(file: BinaryIO, checksum: Any, pieces: Iterable[Tensor]) -> int:
    """Appends numbers to a file and its checksum, and returns where they begin."""
    padding = bytes(-file.tell() % ALIGNMENT)
    start = file.tell() + len(padding)
    for block in chain([memoryview(padding)], (piece.reshape(-1).view(torch.uint8).numpy().data for piece in pieces)):
        file.write(block)
        checksum.update(block)
    return start


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in a thread and with a process group of its own.

    The copy takes the bytes of this rank's state once more in main memory, on a GPU's machine too, and is kept from one
    checkpoint to the next.

    Args:
        checkpoints: the run's folder of them.
        group: of all ranks, used by nothing else: its messages would mix with training's.
        background: False writes while the caller waits, without a copy.
        written: called in that thread with the step of a checkpoint that is on disk, and the seconds that it took, its copy
            included.
    """

    def __init__(
        self,
        checkpoints: Path,
        group: dist.ProcessGroup | None,
        background: bool,
        written: Callable[[int, float], None],
    ) -> None:
        self.checkpoints, self.group, self.background, self.written = checkpoints, group, background, written
        self.copy: Any = None
        self.staging = Staging()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, state: dict[str, Any], manifest: CheckpointManifest) -> None:
        """Starts to write a checkpoint; every rank calls it with its part of the state, after `wait`."""
        begin = time.perf_counter()
        if not self.background:
            self._write(state, manifest, begin)
            return
        self.copy = copy_to_cpu(state, self.staging, self.copy)
        self.thread = threading.Thread(
            target=self._write, args=(self.copy, manifest, begin), daemon=True, name="checkpoint"
        )
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

    def _write(self, state: dict[str, Any], manifest: CheckpointManifest, begin: float) -> None:
        try:
            save(self.checkpoints, state, manifest, self.group)
            self.written(manifest.step, time.perf_counter() - begin)
        except BaseException as error:  # raised by `wait`: a thread's error would be lost
            self.error = error


def copy_to_cpu(value: Any, staging: Staging, into: Any = None) -> Any:
    """A copy of a state in main memory: nested dictionaries of tensors, sharded ones included.

    Args:
        staging: through which tensors of a GPU pass. into: an earlier copy of the same state, whose memory is used again.
    """
    if isinstance(value, dict):
        return {name: copy_to_cpu(item, staging, into[name] if into else None) for name, item in value.items()}
    if isinstance(value, ShardedTensor):
        known = [shard.tensor for shard in into.local_shards()] if into is not None else repeat(None)
        copies = [staging.copied(shard.tensor, copy) for shard, copy in zip(value.local_shards(), known, strict=False)]
        return into if into is not None else on_cpu(value, copies)
    if isinstance(value, DTensor):
        return with_local(value, staging.copied(value.to_local(), into.to_local() if into is not None else None))
    return staging.copied(value, into) if isinstance(value, Tensor) else value
