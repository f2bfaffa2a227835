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
from pipeline.storage.objects import COMMITTING, is_unfinished
from pipeline.storage.store_path import StorePath, remove_tree

STAGING = r"\.staging-[0-9a-f]{32}"  # after the name of the final place


@contextmanager
def staging_of(out: Path) -> Iterator[Path]:
    """A folder OUT.staging-… that is removed in the end, as are those of processes that were killed.

    A process locks its folder, on a store by a lease beside it. On a file system without locks the folders of killed processes
    stay. On a store a folder also stays whose commit has begun and failed: it is the only whole copy, see `recover`.

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
        _remove(staging, out)
        if lock is not None:
            lock.release()


def recover(out: Path) -> None:
    """Ends the commits to a place on a store that failed or were killed; to be called before `out` is looked at.

    On a mounted file system a commit is one step.

    Raises:
        UserError, OSError: as Storage.commit.
    """
    if isinstance(out, StorePath):
        remove_left(out)


def remove_left(out: Path) -> None:
    """Removes the folders of killed processes beside a final place, on a store after their commit where it had begun."""
    # On a store the lease may be all that is left.
    names = re.compile(rf"\.?({re.escape(out.name)}{STAGING})(\.lease)?")
    found = {match[1] for left in out.parent.glob("*") if (match := names.fullmatch(left.name))}
    for name in sorted(found):
        _remove_unlocked(out.with_name(name), out)


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


def _remove_unlocked(folder: Path, out: Path) -> None:
    if isinstance(folder, StorePath):
        assert isinstance(out, StorePath)
        with suppress(BlockingIOError), lease(folder):
            if is_unfinished(folder, out):
                storage_of(out).commit(folder, out)
            _remove_tree(folder)
        return
    if not folder.is_dir():
        return
    with suppress(OSError), storage_of(folder).lock(folder):  # fails for the folder of a running process
        _remove(folder, out)


def _remove(folder: Path, out: Path) -> None:
    """Deletes a folder but one whose commit has begun; what a store or the system refuses is left to the next process."""
    if isinstance(folder, StorePath):
        assert isinstance(out, StorePath)
        with suppress(OSError):
            if not is_unfinished(folder, out):
                _remove_tree(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_tree(folder: StorePath) -> None:
    (folder / COMMITTING).unlink(missing_ok=True)  # first: a half of it is not to be committed
    remove_tree(folder)
