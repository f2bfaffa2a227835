"""A folder in which something is written, beside its final place."""

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from features.errors import UserError
from pipeline.storage.base import Lock
from pipeline.storage.files import storage_of

STAGING = r"\.staging-[0-9a-f]{32}"  # after the name of the final place


@contextmanager
def staging_of(out: Path) -> Iterator[Path]:
    """A folder OUT.staging-… that is removed in the end, as are those of processes that were killed.

    A process locks its folder. On a file system without locks the folders of killed processes stay.

    Raises:
        UserError: it cannot be created.
    """
    remove_left(out)
    staging = out.with_name(f"{out.name}.staging-{uuid.uuid4().hex}")
    lock = None
    try:
        try:
            lock = _locked(staging)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Choose another out=.") from None
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            lock.release()


def remove_left(out: Path) -> None:
    """Removes the folders of killed processes beside a final place."""
    for left in out.parent.glob("*"):
        if re.fullmatch(re.escape(out.name) + STAGING, left.name):
            _remove_unlocked(left)


def is_staging(path: Path) -> bool:
    """Whether a folder is one of `staging_of`, which another process may be writing."""
    return re.search(STAGING + "$", path.name) is not None


def _locked(folder: Path) -> Lock | None:
    """Creates a folder and locks it; repeated where another process removed it before it was locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return storage_of(folder).lock(folder, wait=True)
        except FileNotFoundError:
            continue
        except OSError:  # a file system without locks
            return None


def _remove_unlocked(folder: Path) -> None:
    if not folder.is_dir():
        return
    with suppress(OSError), storage_of(folder).lock(folder):  # fails for the folder of a running process
        shutil.rmtree(folder, ignore_errors=True)
