"""Locks on checkpoints: a reader's keeps one from being deleted."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from features.errors import UserError
from pipeline.run.checkpoint.manifest import CheckpointManifest, check, folder, steps
from pipeline.run.checkpoint.upload import abort_left
from pipeline.storage.base import Lock
from pipeline.storage.files import remove_tree, storage_of
from pipeline.storage.store_path import on_store


@contextmanager
def reading(path: Path, part: int = 0, parts: int = 1) -> Iterator[CheckpointManifest]:
    """Locks a checkpoint that passes `check`, which is not deleted before the block ends. Raises UserError.

    Args:
        part, parts: as `check`: ranks share the work.
    """
    with _locked(path, shared=True, wait=True):
        yield check(path, part, parts)


def _locked(path: Path, shared: bool = False, wait: bool = False) -> Lock:
    """A lock on a checkpoint's manifest. Raises UserError where there is none, BlockingIOError as Storage.lock."""
    file = path / "manifest.json"
    try:
        return storage_of(file).lock(file, shared, wait)
    except FileNotFoundError:
        raise UserError(f"{path}: not a checkpoint, manifest.json is missing or was just deleted") from None


def remove(path: Path, wait: bool = False) -> bool:
    """Deletes a checkpoint, unless another process reads it: then returns False, or waits for it.

    It disappears in one rename, on a store with its manifest; what a crash leaves is no checkpoint, and `tidy` removes it.
    """
    try:
        with _locked(path, wait=wait):
            hidden = path
            if on_store(path):
                (path / "manifest.json").unlink(missing_ok=True)
            else:
                hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}.deleted")
                path.rename(hidden)
    except BlockingIOError:
        return False
    except UserError:  # without a manifest nobody reads it
        hidden = path
    discard(hidden)
    return True


def discard(path: Path) -> None:
    """Deletes a folder with all that is in it, or a link or file, if it is there and can be deleted."""
    with suppress(OSError):
        remove_tree(path)


def tidy(checkpoints: Path) -> None:
    """Removes what killed writers and deleters have left. Only for the process that holds the run's lock."""
    for left in checkpoints.glob(".step-*"):
        discard(left)
    if on_store(checkpoints):
        whole = {folder(checkpoints, step).name for step in steps(checkpoints)}
        for left in checkpoints.glob("step-*"):
            if left.name not in whole:
                discard(left)
        abort_left(checkpoints)
