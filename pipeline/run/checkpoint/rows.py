"""Some rows of a checkpoint's tables, read without the others."""

# Shapes: N rows that are wanted, M of them at a time, K in one read, D columns of a table, R bytes of a row of a part.

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from features.errors import UserError
from features.printable import printable
from features.regular_files import lstat_regular, open_regular
from pipeline.run.checkpoint.index import DTYPES, Index, Part, TensorEntry, read_index
from pipeline.run.checkpoint.manifest import read
from pipeline.storage import ranges
from pipeline.storage.store_path import on_store

GAP_BYTES = 1 << 16  # between two rows that one read takes together: a disk reads these as fast as it seeks
READ_BYTES = 8 << 20  # of one read
READS = 16  # of a file on a store at the same time
GATHER_BYTES = 32 << 20  # of rows that are gathered before they are copied to their tensor

Wanted = Mapping[str, tuple[np.ndarray, Tensor]]


def load_rows(path: Path, wanted: Wanted, index: Index | None = None) -> None:
    """Reads rows of tensors of a checkpoint that `check` has passed, whatever ranks have written it.

    Memory beside the tensors is bounded, and of the files only the rows and short gaps between them are read.

    Args:
        wanted: by full name the rows, int64 and ascending, and what they are copied to, value_ND on any device and of any
            type of numbers.
        index: of the checkpoint (read_index), where it is read more than once.
    Raises:
        UserError: a file was deleted, or a tensor is not there, has other columns or fewer rows.
    """
    index = index or read_index(path, read(path))
    for name, (row_N, value_ND) in wanted.items():
        entry = index.tensors.get(name)
        if entry is None or len(entry.shape) != 2 or entry.shape[1] != value_ND.shape[1]:
            has = "does not have it" if entry is None else f"has {entry.shape}"
            raise UserError(f"{path}: {printable(name)} needs {value_ND.shape[1]} columns, the checkpoint {has}")
        if len(row_N) and (row_N[0] < 0 or row_N[-1] >= entry.shape[0]):
            raise UserError(f"{path}: {printable(name)} has {entry.shape[0]:,} rows, row {row_N[-1]:,} is wanted")
        for part in entry.parts:
            if lstat_regular(path, part.file) is None:
                raise UserError(f"{path / part.file} is missing. Restore it.")
            _load_part(path / part.file, entry, part, row_N, value_ND)


def _load_part(file: Path, entry: TensorEntry, part: Part, row_N: np.ndarray, value_ND: Tensor) -> None:
    """Copies the wanted rows that a part has, in its columns."""
    (first, column), (rows, columns) = part.offsets, part.sizes
    low, high = (int(place) for place in np.searchsorted(row_N, [first, first + rows]))
    row_bytes = columns * entry.itemsize
    if low == high or not columns:
        return
    step = max(1, GATHER_BYTES // row_bytes)
    with nullcontext() if on_store(file) else open_regular(file) as opened:
        for begin in range(low, high, step):
            end = min(begin + step, high)
            byte_MR = _gathered(opened, file, part.start, row_N[begin:end] - first, row_bytes)
            value = torch.from_numpy(byte_MR).view(DTYPES[entry.dtype])
            value_ND[begin:end, column : column + columns].copy_(value)


def _gathered(opened: BinaryIO | None, file: Path, start: int, row_M: np.ndarray, row_bytes: int) -> np.ndarray:
    """The bytes of ascending rows of a part that begins at `start` of a file, byte_MR.

    Args:
        opened: the file, None on a store.
    """
    byte_MR = np.empty((len(row_M), row_bytes), np.uint8)
    runs = list(_runs(row_M, row_bytes, GAP_BYTES if opened else ranges.GAP_BYTES))
    count = 1 if opened else READS
    for some in (runs[first : first + count] for first in range(0, len(runs), count)):
        bounds = [(start + int(row_M[a]) * row_bytes, start + (int(row_M[b - 1]) + 1) * row_bytes) for a, b in some]
        for (begin, end), content in zip(some, _contents(opened, file, bounds), strict=True):
            row_K = row_M[begin:end] - row_M[begin]
            byte_MR[begin:end] = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)[row_K]
    return byte_MR


def _contents(opened: BinaryIO | None, file: Path, bounds: Sequence[tuple[int, int]]) -> list[bytes]:
    """Some ranges of a file. Raises UserError where it ends before one does."""
    try:
        found = (
            [os.pread(opened.fileno(), stop - start, start) for start, stop in bounds]
            if opened
            else ranges.read_ranges(file, bounds)
        )
    except ranges.ShortFileError:
        found = []
    if [len(content) for content in found] != [stop - start for start, stop in bounds]:
        raise UserError(f"{file} ends before a row that its index has: it changed while it was read")
    return found


def _runs(row_M: np.ndarray, row_bytes: int, gap: int) -> Iterator[tuple[int, int]]:
    """Ranges of `row_M` that one read each takes: of rows close to each other, and of a limited length.

    Args:
        gap: bytes between two rows that one read takes together at most.
    """
    far = np.diff(row_M) - 1 > gap // row_bytes
    full = np.diff(row_M // max(1, READ_BYTES // row_bytes)) > 0
    edges = [0, *(np.flatnonzero(far | full) + 1).tolist(), len(row_M)]
    return zip(edges, edges[1:], strict=False)
