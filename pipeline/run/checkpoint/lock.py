"""Who reads a checkpoint holds it, and who deletes it waits, or leaves it alone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import UserError
from pipeline.run.checkpoint.manifest import CheckpointManifest, check
from pipeline.storage.base import Lock
from pipeline.storage.files import storage_of


@contextmanager
def reading(path: Path) -> Iterator[CheckpointManifest]:
    """Holds a checkpoint: it has passed `check`, and is not deleted before the block ends. Raises UserError."""
    with _locked(path, shared=True, wait=True):
        yield check(path)


def _locked(path: Path, shared: bool = False, wait: bool = False) -> Lock:
    """A lock on a checkpoint's manifest. Raises UserError where there is none, BlockingIOError as Storage.lock."""
    file = path / "manifest.json"
    try:
        return storage_of(file).lock(file, shared, wait)
    except FileNotFoundError:
        raise UserError(f"{path}: not a checkpoint, manifest.json is missing or was just deleted") from None


def remove(path: Path, wait: bool = False) -> bool:
    """Deletes a checkpoint unless somebody reads it: then returns False, or waits for them.

    It disappears in one rename; what a crash leaves behind that is hidden, and `tidy` takes it away.
    """
    try:
        with _locked(path, wait=wait):
            hidden = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
    except BlockingIOError:
        return False
    except UserError:  # without a manifest nobody reads it
        hidden = path
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def tidy(checkpoints: Path) -> None:
    """Takes away what killed writers and deleters have left. Only for who may write here."""
    for left in checkpoints.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
