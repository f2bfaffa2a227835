"""The index of a checkpoint, tensors.json: which tensors it has, and where in its files the bytes of each part lie.

The files hold bare numbers, row after row, in the byte order of the machine. Neither they nor the index is a pickle, so
reading them runs nothing, and what a tensor takes in memory is what it takes on the disk.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from features.errors import UserError
from features.plain_json import Count, first_fault
from features.printable import printable
from features.regular_files import lstat_regular, read_regular
from pipeline.run.checkpoint.manifest import CheckpointManifest, FileName, index_of

MAX_INDEX_BYTES = 256 << 20
MAX_DIMENSIONS = 8
MAX_COMPARISONS = 1 << 28  # of two parts of a tensor: about a second; 16 thousand parts that are all side by side
ALIGNMENT = 64  # bytes, of a part's start in its file
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip

Sizes = Annotated[list[Count], Field(max_length=MAX_DIMENSIONS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(_Strict):
    """A block of a tensor: its place in the tensor (offsets, sizes), and its first byte in a file."""

    offsets: Sizes
    sizes: Sizes
    file: FileName
    start: Count


class TensorEntry(_Strict):
    """A tensor and its parts, which cover it without overlapping."""

    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    shape: Sizes
    parts: list[Part]

    @model_validator(mode="after")
    def _covered(self) -> "TensorEntry":
        shape = [len(self.parts), len(self.shape)]
        if {len(sizes) for part in self.parts for sizes in (part.offsets, part.sizes)} - {shape[1]}:
            raise ValueError("a part has another number of dimensions than its tensor")
        if volume(self.shape) >= 1 << 60 or any(volume(part.sizes) >= 1 << 60 for part in self.parts):
            raise ValueError("more elements than any checkpoint has")
        begin_PD = np.array([part.offsets for part in self.parts], np.int64).reshape(shape)
        size_PD = np.array([part.sizes for part in self.parts], np.int64).reshape(shape)
        if (begin_PD > np.array(self.shape) - size_PD).any():
            raise ValueError("a part reaches beyond its tensor")
        if sum(volume(part.sizes) for part in self.parts) != volume(self.shape):
            raise ValueError("its parts do not add up to it")
        filled = (size_PD > 0).all(1)
        if _overlap(begin_PD[filled], (begin_PD + size_PD)[filled]):
            raise ValueError("two of its parts overlap")
        return self

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize


class Index(_Strict):
    """The tensors of a checkpoint by their full names."""

    version: Literal[1] = 1
    tensors: dict[str, TensorEntry]


def volume(sizes: list[int]) -> int:
    """The number of elements."""
    total = 1
    for size in sizes:
        total *= size
    return total


def read_index(path: Path, manifest: CheckpointManifest) -> Index:
    """The index of a checkpoint, compared with the sizes of its files.

    Raises:
        UserError: it is missing, is none, or names bytes that a file does not have.
    """
    name_of_index = index_of(manifest)
    try:
        index = Index.model_validate_json(read_regular(path, name_of_index, MAX_INDEX_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path / name_of_index} is missing") from None
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{path / name_of_index} is not the index of a checkpoint: {first_fault(error)}") from None
    for file, (listed, _) in manifest.files.items():
        if (status := lstat_regular(path, file)) is None or status.st_size != listed:
            raise UserError(f"{path / file} is missing, or has another size than the manifest has. Restore it.")
    taken: Counter[str] = Counter()
    for name, entry in index.tensors.items():
        for part in entry.parts:
            size, _ = manifest.files.get(part.file, (None, ""))
            if size is None:
                raise UserError(
                    f"{path / name_of_index}: {printable(name)} lies in {part.file}, which the manifest does not name"
                )
            length = volume(part.sizes) * entry.itemsize
            taken[part.file] += length
            if part.start % ALIGNMENT or part.start + length > size or taken[part.file] > size:
                raise UserError(
                    f"{path / name_of_index}: {printable(name)} does not fit into the {size:,} bytes of {part.file}"
                )
    return index


def _overlap(begin_PD: np.ndarray, end_PD: np.ndarray) -> bool:
    """Whether two of P blocks that are not empty share an element."""
    if len(begin_PD) < 2 or not begin_PD.shape[1]:
        return len(begin_PD) > 1
    order = np.argsort(begin_PD[:, 0], kind="stable")
    begin_PD, end_PD = begin_PD[order], end_PD[order]
    stop_P = np.searchsorted(begin_PD[:, 0], end_PD[:, 0])  # those from there on begin behind this one's end
    if (stop_P - np.arange(len(stop_P)) - 1).sum() > MAX_COMPARISONS:
        raise ValueError("it has more parts side by side than any checkpoint")
    return any(
        ((begin_PD[i + 1 : stop] < end_PD[i]) & (begin_PD[i] < end_PD[i + 1 : stop])).all(1).any()
        for i, stop in enumerate(stop_P)
    )
