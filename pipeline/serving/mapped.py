"""Files of a package mapped into memory: nothing is read before it is needed, and processes share what was."""

import mmap
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.errors import UserError
from features.regular_files import lstat_regular, open_regular
from pipeline.serving.manifest import HINT, Manifest

# Of a mapping whose pages are copied when they are written: no memory is set aside for those that never are. Python's mmap
# has the name from 3.13 on.
MAP_NORESERVE = 0x4000


def mapped(folder: Path, manifest: Manifest, name: str, size: int, writable: bool = False) -> np.ndarray:
    """The bytes of a file of a package, uint8. The file must not be cut while they are in use.

    Args:
        size: that it must have.
        writable: what is written stays in this process; the file does not change.
    Raises:
        UserError: it is missing, a link, not a file of the manifest, or of another size.
    """
    if (expected := manifest.files.get(name)) is None:
        raise UserError(f"{folder}: the manifest's tables lie in {name}, which is none of its files. {HINT}")
    if expected.bytes != size:
        raise UserError(f"{folder}: {name} has {expected.bytes:,} bytes, the manifest's tables {size:,}. {HINT}")
    if (status := lstat_regular(folder, name)) is None:
        raise UserError(f"{folder / name} is missing. {HINT}")
    if status.st_size != size:
        raise UserError(f"{folder / name} has {status.st_size:,} bytes, the manifest says {size:,}. {HINT}")
    if not size:
        return np.zeros(0, np.uint8)
    with open_regular(folder / name) as file:
        try:
            return np.frombuffer(_mapping(file.fileno(), size, writable), np.uint8)
        except ValueError:
            raise UserError(f"{folder / name} was cut while it was opened. {HINT}") from None


def _mapping(descriptor: int, size: int, writable: bool) -> mmap.mmap:
    if writable:
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)


def tensor(values: np.ndarray) -> Tensor:
    """A tensor of the same memory, which is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written
        return torch.from_numpy(values)
