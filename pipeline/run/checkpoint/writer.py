"""Checkpoints written to a temporary folder, checksummed and renamed into place, in the background if asked for.

On a store the files are sent to their final place, under names of their own; they are a checkpoint once the manifest is there.
Training waits only while its state is copied in memory.
"""

import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
from pipeline.run.checkpoint.manifest import INDEX, CheckpointManifest, folder, index_of
from pipeline.run.checkpoint.staging import Staging
from pipeline.run.checkpoint.upload import sending
from pipeline.run.run import LostRunError
from pipeline.storage.conditional import content_of
from pipeline.storage.files import json_text, storage_of, write_json, write_text
from pipeline.storage.objects import write_new
from pipeline.storage.store_path import StorePath, on_store
from pipeline.torch_compat import ShardedTensor, on_cpu, with_local


class _Place(NamedTuple):
    """Where the files of a checkpoint that is being written lie, and what the names of its files end with."""

    folder: Path
    suffix: str = ""


class _Failure(NamedTuple):
    """Why a checkpoint could not be written; lost: the run is another trainer's."""

    why: str
    lost: bool


def save(
    checkpoints: Path,
    state: dict[str, Any],
    manifest: CheckpointManifest,
    group: dist.ProcessGroup | None = None,
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint; every rank calls it with its part of the state.

    The files lie in a hidden folder until all of them and the manifest are on disk; then one rename makes it a checkpoint. On a
    store, which has no rename, they are one once the manifest is there.

    Args:
        state: nested dictionaries of tensors. group: of all ranks, for the messages that this takes; the default group if None.
        before: called on rank 0 before it removes what stands there, and before it commits; raises LostRunError.
    Raises:
        UserError: on every rank, if one cannot write, as on a full disk; the checkpoints before it stay. LostRunError.
    """
    final = folder(checkpoints, manifest.step)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    outcome: list[Any] = [_attempt(_begin, final, before) if rank == 0 else None]
    dist.broadcast_object_list(outcome, group=group)
    place = outcome[0]
    if not isinstance(place, _Failure):
        parts: list[Any] | None = [None] * ranks if rank == 0 else None
        dist.gather_object(_attempt(_write, place.folder, place.suffix, state, group), parts, group=group)
        if parts is not None:
            failed = next((part for part in parts if isinstance(part, _Failure)), None)
            files = {} if failed else {name: entry for part in parts for name, entry in part.items()}
            outcome = [failed or _attempt(_commit, place.folder, final, manifest.sealed(files), before)]
        dist.broadcast_object_list(outcome, group=group)
    if isinstance(failure := outcome[0], _Failure):
        if rank == 0 and isinstance(place, _Place):
            with suppress(OSError):
                _discard(place)
        kind = LostRunError if failure.lost else UserError
        raise kind(f"{final}: cannot be written: {failure.why}. Earlier checkpoints stay.")
    return final


def _attempt(act: Any, *arguments: Any) -> Any:
    """What `act` returns, or the reason why it failed as one line: the other ranks wait for either."""
    try:
        return act(*arguments)
    except (CheckpointException, OSError, UserError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, Exception):
            raise cause from None  # an interrupt, which dcp wraps as well
        return _Failure(one_line(cause), isinstance(cause, LostRunError))


def _begin(final: Path, before: Callable[[], None]) -> _Place:
    """A new folder: what a killed writer left is removed, and a link there is not followed.

    On a store it is the final one. A writer that was taken for dead may finish its files there later: their names are others.
    """
    before()
    if on_store(final):
        remove(final, wait=True)
        return _Place(final, f"-{uuid.uuid4().hex[:12]}")
    staging = final.with_name(f".{final.name}")
    discard(staging)
    staging.mkdir(parents=True)
    return _Place(staging)


def _discard(place: _Place) -> None:
    """Removes what this writer has written, and on a store nothing that may be another's by now.

    Where the store has put the manifest, and its answer alone was lost, the checkpoint is one and stays.
    """
    if not isinstance(place.folder, StorePath):
        discard(place.folder)
        return
    if place.suffix.encode() in (content_of(place.folder / "manifest.json") or b""):
        return
    for file in place.folder.glob(f"*{place.suffix}.*"):
        file.unlink(missing_ok=True)


def _write(
    staging: Path, suffix: str, state: dict[str, Any], group: dist.ProcessGroup | None
) -> dict[str, tuple[int, str]]:
    """This rank's files: name to bytes and checksum."""
    writer = _Writer(staging, dist.get_rank(), suffix)
    dcp.save(state, storage_writer=writer, process_group=group)
    return writer.files


def _commit(staging: Path, final: Path, manifest: CheckpointManifest, before: Callable[[], None]) -> None:
    if on_store(final):
        strays = _check_complete(staging, manifest)
        before()
        _put(final / "manifest.json", json_text(manifest.model_dump(), indent=1))
        for name in strays:
            with suppress(OSError):
                (final / name).unlink(missing_ok=True)
        return
    write_json(staging / "manifest.json", manifest.model_dump())
    _check_complete(staging, manifest)
    before()
    if final.exists():  # a damaged one: the run was rolled back
        remove(final, wait=True)
    storage_of(final).commit(staging, final)


def _put(path: Path, text: str) -> None:
    """Writes a file that is not there yet: on a store another writer, of the same step, may have been faster."""
    if isinstance(path, StorePath):
        write_new(path, text.encode())
    else:
        write_text(path, text)


def _check_complete(staging: Path, manifest: CheckpointManifest) -> list[str]:
    """Compares the files of the manifest with those in the folder, and with those that the index says tensors are in.

    On a store others may be there, of a writer that was taken for dead: returns their names.

    Raises:
        OSError: naming a file that is not in all three.
        UserError: the index does not fit them.
    """
    listed, present = set(manifest.files) | {"manifest.json"}, {path.name for path in staging.iterdir()}
    strays: list[str] = []
    if on_store(staging):  # its manifest comes after this, and leases may lie there
        strays = sorted(name for name in present - listed if not name.startswith("."))
        present = (present & listed) | {"manifest.json"}
    indexed = {part.file for entry in read_index(staging, manifest).tensors.values() for part in entry.parts}
    if missing := (listed ^ present) | (listed ^ (indexed | {index_of(manifest), "manifest.json"})):
        raise OSError(f"{sorted(missing)[0]} is not in all of manifest, folder and index")
    return strays


def data_file(rank: int, suffix: str = "") -> str:
    """The name of the file with what a rank has written of the tensors."""
    return f"rank-{rank:05d}{suffix}.bin"


class _Writer(dcp.StorageWriter):
    """Writes a rank's parts of the tensors one after the other, and on rank 0 the index of all ranks' parts.

    Which rank writes what is torch.distributed.checkpoint's plan.

    Attributes:
        files: what was written: name to bytes and checksum, taken of the content on its way.
    """

    def __init__(self, path: Path, rank: int, suffix: str = "") -> None:
        super().__init__()
        self.path, self.name, self.staging = path, data_file(rank, suffix), Staging()
        self.index = INDEX.replace(".", f"{suffix}.")
        self.files: dict[str, tuple[int, str]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, name, checksum = [], self.name, hashlib.sha256()
        if plan.items:
            with sending(self.path / name) as file:
                for item in plan.items:
                    if item.type == WriteItemType.BYTE_IO:
                        raise TypeError(f"{item.index.fqn} is no tensor: a checkpoint holds nothing else")
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    start = _write_aligned(file, checksum, self.staging.pieces(tensor))
                    part = Part(offsets=[], sizes=list(tensor.size()), file=name, start=start)
                    results.append(WriteResult(item.index, tensor.nbytes, part))
                self.files[name] = file.tell(), checksum.hexdigest()
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
        _put(self.path / self.index, content)
        self.files[self.index] = len(content.encode()), hashlib.sha256(content.encode()).hexdigest()

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
        before: see `save`.
    """

    def __init__(
        self,
        checkpoints: Path,
        group: dist.ProcessGroup | None,
        background: bool,
        written: Callable[[int, float], None],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoints, self.group, self.background, self.written = checkpoints, group, background, written
        self.before = before
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
            save(self.checkpoints, state, manifest, self.group, self.before)
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
