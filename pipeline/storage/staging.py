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
from pipeline.storage.lease import lease
from pipeline.storage.store_path import StorePath, remove_tree

STAGING = r"\.staging-[0-9a-f]{32}"  # after the name of the final place


@contextmanager
def staging_of(out: Path) -> Iterator[Path]:
    """A folder OUT.staging-… that is removed in the end, as are those of processes that were killed.

    A process locks its folder, on a store by a lease beside it. On a file system without locks the folders of killed processes
    stay.

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
        _remove(staging)
        if lock is not None:
            lock.release()


def remove_left(out: Path) -> None:
    """Removes the folders of killed processes beside a final place."""
    names = re.compile(
        rf"\.?({re.escape(out.name)}{STAGING})(\.lease)?"
    )  # on a store the lease may be all that is left
    found = {match[1] for left in out.parent.glob("*") if (match := names.fullmatch(left.name))}
    for name in sorted(found):
        _remove_unlocked(out.with_name(name))


def is_staging(path: Path) -> bool:
    """Whether a folder is one of `staging_of`, which another process may be writing."""
    return re.search(STAGING + "$", path.name) is not None


def _locked(folder: Path) -> Lock | None:
    """Creates a folder and locks it; repeated where another process removed it before it was locked."""
    if isinstance(folder, StorePath):
        return lease(folder, wait=True)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return storage_of(folder).lock(folder, wait=True)
        except FileNotFoundError:
            continue
        except OSError:  # a file system without locks
            return None


def _remove_unlocked(folder: Path) -> None:
    if isinstance(folder, StorePath):
        with suppress(BlockingIOError), lease(folder):
            remove_tree(folder)
        return
    if not folder.is_dir():
        return
    with suppress(OSError), storage_of(folder).lock(folder):  # fails for the folder of a running process
        _remove(folder)


def _remove(folder: Path) -> None:
    """Deletes a folder; what a store or the system refuses is left to the next process."""
    if isinstance(folder, StorePath):
        with suppress(OSError):
            remove_tree(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
