"""Storage on a mounted file system: rename, fsync and flock."""

import ctypes
import fcntl
import glob
import os
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from features.regular_files import NO_LINK, mounted

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)


class FileLock:
    """An flock on an open descriptor, given up at the latest when nobody refers to it any more."""

    lost = False  # it ends with its process alone

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.release = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class LocalStorage:
    """See pipeline.storage.base.Storage."""

    def read(self, path: Path) -> bytes:
        """A file's content."""
        return path.read_bytes()

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file durably and atomically."""
        with replacing(path) as temporary:
            temporary.write_bytes(content)

    def list(self, folder: Path, pattern: str) -> list[Path]:
        """Entries of a folder that match a glob pattern, sorted."""
        return sorted(folder.glob(pattern))

    def commit(self, staging: Path, final: Path) -> None:
        """Moves a folder into place in one rename, or exchanges it with the one that stands there."""
        fsync(staging)
        if final.exists():
            swap_dirs(staging, final)
        else:
            staging.rename(final)
        fsync(final.parent)

    def lock(self, path: Path, shared: bool = False, wait: bool = False, create: bool = False) -> FileLock:
        """Locks a file or folder with flock."""
        lock = FileLock(os.open(path, NO_LINK | (os.O_CREAT if create else 0), 0o666))
        try:
            fcntl.flock(lock.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            if not os.path.samestat(os.fstat(lock.descriptor), path.lstat()):
                raise FileNotFoundError(f"{path} was replaced")
        except BaseException:
            lock.release()
            raise
        return lock


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it takes the file's place, fsync to disk, when the block ends well.

    The file is made under a random name that nothing had, and a link at `path` is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        fsync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path, seconds: float = 0) -> None:
    """Deletes the temporary files that killed writers of a file have left beside it.

    Args:
        seconds: since their last change. 0 is for a process that alone writes the file now.
    """
    if not mounted(path):  # on a store a file appears whole
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}"):
        with suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime >= seconds:
                left.unlink()


def swap_dirs(one: Path, other: Path) -> None:
    """Lets two folders change names in one step, where the system can (Linux: renameat2), else in two."""
    both = [os.fsencode(path) for path in (one, other)]
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and libc.renameat2(AT_FDCWD, both[0], AT_FDCWD, both[1], RENAME_EXCHANGE) == 0:
        return
    temporary = other.with_name(f"{other.name}.old-{uuid.uuid4().hex}")
    other.rename(temporary)
    one.rename(other)
    temporary.rename(one)


def fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(folder: Path) -> None:
    """`fsync` of a folder and of all files and folders below it."""
    for path in (*folder.rglob("*"), folder):
        fsync(path)
