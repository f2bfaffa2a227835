"""Checkpoints loaded on any number of ranks, without trusting their pickle."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from features.errors import UserError
from pipeline.torch_compat import METADATA_CLASSES


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint that `check` has passed, by its full name. Raises UserError."""
    try:
        entries = _Reader(path).read_metadata().state_dict_metadata.items()
    except OSError as error:
        raise _unreadable(path, error) from None
    return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def data_files(path: Path) -> set[str]:
    """Names of the files that hold the tensors of a checkpoint, as .metadata has them. Raises OSError, UserError."""
    return {place.relative_path for place in _Reader(path).read_metadata().storage_data.values()}


def load(path: Path, state: dict[str, Any], alone: bool = False) -> None:
    """Reads a checkpoint that `check` has passed into a state of the same names and shapes, on any number of ranks.

    Args:
        state: filled in place.
        alone: without a process group, into unsharded modules.
    Raises:
        UserError: it was deleted, does not fit the state, or contains anything but tensors.
    """
    reader = _Reader(path)
    try:
        reader.read_metadata()  # for its error: dcp.load would catch it and try another format
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
        except Exception:  # bytes that are no pickle raise anything
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
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # the name in Python 3.13
        if (module, name) in METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise UserError(f".metadata names {module}.{name}: not a checkpoint of tensors, loading it could run code")
