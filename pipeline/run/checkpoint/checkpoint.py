"""Checkpoints: written aside, checksummed, renamed into place, and trusted only with a manifest that fits."""

import fcntl
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from features.errors import UserError
from pipeline.dataset.dataset import flushed, sha256, write_json
from pipeline.run.run import config_hash

VERSION = 2


class CheckpointManifest(BaseModel):
    """What a checkpoint is and what its files are.

    Attributes:
        step: batches passed, those of `skipped` without learning from them.
        rows: learnt from, padding apart. left_out: passed without that, in skipped batches or unreadable row groups.
        skipped: steps whose batch is left out, since its loss is not finite; they may lie ahead.
        epoch, cursors: the loader's position.
        ranks: that wrote it.
        seed, window, batch_size, data (hash of the train split's shards): what the order of rows depends on besides.
        fingerprint: of the schema. encoders: of what was fitted. config: hash of what shapes the state (model and optimisers).
        files: name to (bytes, sha256).
        checksum: of all the rest, since a flipped digit of a cursor is still a cursor.
    """

    version: int = VERSION
    step: int
    rows: int
    left_out: int = 0
    skipped: list[int] = []
    epoch: int
    cursors: list[int]
    ranks: int = 1
    seed: int
    window: int
    batch_size: int
    data: str
    fingerprint: str
    encoders: str
    config: str
    files: dict[str, tuple[int, str]] = {}
    checksum: str = ""

    def sealed(self, files: dict[str, tuple[int, str]]) -> "CheckpointManifest":
        """The same with its files and its checksum."""
        content = self.model_copy(update={"files": files}).model_dump(exclude={"checksum"})
        return self.model_copy(update={"files": files, "checksum": config_hash(content)})


def folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


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
    aside = final.with_name(f".{final.name}")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier(group)
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, _attempt(_write, aside, state, group), group)
    outcome = [next((part for part in parts if isinstance(part, str)), None)]
    if rank == 0 and outcome[0] is None:
        files = {name: entry for part in parts for name, entry in part.items()}
        outcome = [_attempt(_commit, aside, final, manifest.sealed(files))]
    dist.broadcast_object_list(outcome, group=group)
    if outcome[0] is not None:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
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


def _write(aside: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, tuple[int, str]]:
    """This rank's files in `aside`: name to bytes and checksum."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(aside, sync_files=True), process_group=group)
    rank = dist.get_rank()
    ours = [p for p in aside.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and p.name == ".metadata")]
    return {p.name: (p.stat().st_size, sha256(p)) for p in ours}


def _commit(aside: Path, final: Path, manifest: CheckpointManifest) -> None:
    write_json(aside / "manifest.json", manifest.model_dump())
    flushed(aside)
    if final.exists():  # a damaged one: the run has gone back
        remove(final, wait=True)
    aside.rename(final)
    flushed(final.parent)


@contextmanager
def reading(path: Path) -> Iterator[CheckpointManifest]:
    """Holds a checkpoint: it has passed `check`, and is not deleted before the block ends. Raises UserError."""
    with _lock(path, fcntl.LOCK_SH):
        yield check(path)


def remove(path: Path, wait: bool = False) -> bool:
    """Deletes a checkpoint unless somebody reads it: then returns False, or waits for them.

    It disappears in one rename; what a crash leaves behind that is hidden, and `tidy` takes it away.
    """
    try:
        with _lock(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            aside = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    except BlockingIOError:
        return False
    except UserError:  # without a manifest nobody reads it
        aside = path
    shutil.rmtree(aside, ignore_errors=True)
    return True


def tidy(checkpoints: Path) -> None:
    """Takes away what killed writers and deleters have left. Only for who may write here."""
    for left in checkpoints.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _lock(path: Path, how: int) -> IO[str]:
    """A lock on a checkpoint's manifest, held until it is closed."""
    try:
        file = (path / "manifest.json").open()
        fcntl.flock(file, how)
        if os.path.samestat(os.fstat(file.fileno()), (path / "manifest.json").stat()):
            return file
    except BlockingIOError:
        file.close()
        raise
    except FileNotFoundError:
        pass
    raise UserError(f"{path}: not a checkpoint, manifest.json is missing or was just deleted")


def read(path: Path) -> CheckpointManifest:
    """A checkpoint's manifest. Raises UserError where there is none that can be read."""
    try:
        manifest = CheckpointManifest.model_validate_json((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:  # damaged text is no UTF-8, no JSON, or no manifest
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise UserError(f"{path}: not a checkpoint, manifest.json {reason}") from None
    if manifest.version != VERSION:
        raise UserError(f"{path}: checkpoint of version {manifest.version}, this release reads {VERSION}")
    if manifest != manifest.sealed(manifest.files):
        raise UserError(f"{path / 'manifest.json'}: its checksum is not its content's: it changed after it was written")
    return manifest


def check(path: Path, part: int = 0, parts: int = 1) -> CheckpointManifest:
    """Reads a checkpoint's manifest and compares every file with it.

    Args:
        part, parts: of the files only each `parts`-th, from `part` on: ranks share the work.
    Raises:
        UserError: naming what is missing or differs.
    """
    manifest = read(path)
    for name, (size, checksum) in sorted(manifest.files.items())[part::parts]:
        file = path / name
        if not file.exists():
            raise UserError(f"{file} is missing")
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
        if sha256(file) != checksum:
            raise UserError(f"{file}: its checksum is not the manifest's: it changed after it was written")
    return manifest


def steps(checkpoints: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending; whether their files fit is for `check` to say."""
    found = (p for p in checkpoints.glob("step-*") if (p / "manifest.json").exists())
    return sorted(int(number) for p in found if (number := p.name.removeprefix("step-")).isdecimal())


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint that `check` has passed, by its full name. Raises UserError."""
    try:
        entries = _Reader(path).read_metadata().state_dict_metadata.items()
    except OSError as error:
        raise _unreadable(path, error) from None
    return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def load(path: Path, state: dict[str, Any], alone: bool = False) -> None:
    """Reads a checkpoint that `check` has passed into a state of the same names and shapes, on any number of ranks.

    Args:
        state: filled in place.
        alone: without a process group, into unsharded modules.
    Raises:
        UserError: it is gone, does not fit the state, or holds what is no tensor.
    """
    reader = _Reader(path)
    try:
        reader.read_metadata()  # first by itself: dcp.load would try again elsewhere where this fails
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path}: cannot be loaded: {' '.join(str(cause).split())[:300]}") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror} ({error.filename})")


class _Reader(dcp.FileSystemReader):
    """Reads .metadata, a pickle, without letting it name anything but what describes tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Unpickler(file).load()
            entries = metadata.state_dict_metadata
            places = [place.relative_path for place in metadata.storage_data.values()]
        except (UserError, OSError):
            raise
        except Exception:  # a pickle that is none raises what it likes
            raise UserError(f"{self.path}/.metadata cannot be read: not a checkpoint") from None
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{self.path}: {name} is no tensor; loading it could run code, so it is refused")
        if outside := [place for place in places if place != Path(place).name]:
            raise UserError(f"{self.path}/.metadata names {outside[0]}, a file outside of the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    ALLOWED = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
                "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "PosixPath"),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise UserError(f".metadata names {module}.{name}: not a checkpoint of tensors, loading it could run code")
