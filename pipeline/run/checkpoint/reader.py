"""Checkpoints loaded on any number of ranks: bytes into tensors that are there, by an index of names and places."""

import io
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from features.errors import UserError, one_line
from features.regular_files import lstat_regular
from pipeline.run.checkpoint.index import DTYPES, Index, Part, TensorEntry, read_index, volume
from pipeline.run.checkpoint.manifest import read
from pipeline.run.checkpoint.rows import GAP_BYTES
from pipeline.storage.ranges import RangedFile
from pipeline.storage.store_path import on_store

BLOCK_BYTES = 32 << 20  # that are in memory beside the tensor which is filled: a table may be as large as the memory


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint that `check` has passed, by its full name. Raises UserError."""
    return {name: tuple(entry.shape) for name, entry in read_index(path, read(path)).tensors.items()}


def load(path: Path, state: dict[str, Any], alone: bool = False) -> None:
    """Reads a checkpoint that `check` has passed into a state of the same names and shapes, on any number of ranks.

    Args:
        state: filled in place; tensors only.
        alone: without a process group, into unsharded modules.
    Raises:
        UserError: it was deleted, or does not fit the state.
    """
    reader = _Reader(path, read_index(path, read(path)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=reader, planner=_TensorsOnly(), no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"{path}: cannot be loaded: {one_line(cause)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror} ({error.filename})") from None


class _TensorsOnly(dcp.DefaultLoadPlanner):
    """Refuses what the default planner would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002
        raise _no_tensor(read_item)


class _Reader(dcp.StorageReader):
    """Reads the parts of tensors that a plan asks for; the plans of all ranks are torch.distributed.checkpoint's."""

    def __init__(self, path: Path, index: Index) -> None:
        super().__init__()
        self.path, self.index = path, index
        self.parts = {
            MetadataIndex(name, part.offsets): (entry, part)
            for name, entry in index.tensors.items()
            # An empty part may begin where another does, and must not stand for it.
            for part in sorted(entry.parts, key=lambda part: volume(part.sizes))
        }

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return Metadata(
            {name: _described(entry) for name, entry in self.index.tensors.items()}, storage_meta=StorageMeta()
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise _no_tensor(item)
            by_file[self.parts[item.storage_index][1].file].append(item)
        for name, items in by_file.items():
            if lstat_regular(self.path, name) is None:
                raise FileNotFoundError(2, "No such file or directory", str(self.path / name))
            path = self.path / name
            with RangedFile(path) if on_store(path) else path.open("rb") as file:
                for item in items:
                    entry, part = self.parts[item.storage_index]
                    target = planner.resolve_tensor(item).detach()
                    _read_into(target, file, entry, part, item)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None: ...

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return True


def _described(entry: TensorEntry) -> TensorStorageMetadata:
    """An entry of the index as torch.distributed.checkpoint plans with it."""
    chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in entry.parts]
    return TensorStorageMetadata(TensorProperties(DTYPES[entry.dtype]), torch.Size(entry.shape), chunks)


def _read_into(
    target: Tensor, file: io.BufferedReader | RangedFile, entry: TensorEntry, part: Part, item: ReadItem
) -> None:
    """Copies the block of a part that a plan asks for."""

    def read(start: int, sizes: list[int]) -> Tensor:
        return _read_rows(file, start, sizes, entry, item)

    _read_block(target, read, entry.itemsize, part.start, part.sizes, list(item.storage_offsets), list(item.lengths))


def _read_block(
    target: Tensor,
    read: Callable[[int, list[int]], Tensor],
    itemsize: int,
    start: int,
    sizes: list[int],
    offsets: list[int],
    lengths: list[int],
) -> None:
    """Copies a block of an array, some rows at a time; only the rows that hold it are read, of long ones not all of it.

    Args:
        read: gives the array at a byte, of the sizes. start, sizes: of the whole array. offsets, lengths: of the block in it.
    """
    if not sizes:
        target.copy_(read(start, []))
        return
    row_bytes = volume(sizes[1:]) * itemsize
    gap = row_bytes - volume(lengths[1:]) * itemsize
    first, rows = offsets[0], lengths[0]
    if row_bytes > BLOCK_BYTES or gap > GAP_BYTES:
        for row in range(rows):
            begin = start + (first + row) * row_bytes
            _read_block(target[row], read, itemsize, begin, sizes[1:], offsets[1:], lengths[1:])
        return
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        block = read(start + (first + begin) * row_bytes, [count, *sizes[1:]])
        for dimension in range(1, block.dim()):
            block = block.narrow(dimension, offsets[dimension], lengths[dimension])
        target[begin : begin + count].copy_(block)


def _read_rows(
    file: io.BufferedReader | RangedFile, start: int, sizes: list[int], entry: TensorEntry, item: ReadItem
) -> Tensor:
    """The tensor of these sizes whose bytes begin at `start`."""
    block = torch.empty(sizes, dtype=DTYPES[entry.dtype])
    file.seek(start)
    content = block.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(content) != len(content):
        name = file.path if isinstance(file, RangedFile) else file.name
        raise UserError(f"{name} ends before its part of {item.storage_index.fqn}: it changed while it was read")
    return block


def _no_tensor(item: ReadItem) -> UserError:
    return UserError(f"{item.storage_index.fqn} is no tensor; loading it could run code, so it is refused")
