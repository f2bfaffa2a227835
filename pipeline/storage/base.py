"""What any storage can do; datasets, runs and checkpoints are written through it."""

from pathlib import Path
from types import TracebackType
from typing import Protocol


class Lock(Protocol):
    """A lock that is held until it is released or its process ends; a context manager that releases it."""

    @property
    def lost(self) -> bool:
        """Whether another has taken it over, as it can where an owner does not answer; whoever commits under it asks first."""

    def release(self) -> None:
        """Gives the lock up."""

    def __enter__(self) -> "Lock": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Storage(Protocol):
    """Files and folders by path. All methods raise OSError where the storage refuses."""

    def read(self, path: Path) -> bytes:
        """A file's content."""

    def write(self, path: Path, content: bytes) -> None:
        """Writes a file durably and atomically: a reader sees all of it, or what was there before."""

    def list(self, folder: Path, pattern: str) -> list[Path]:
        """Entries of a folder that match a glob pattern, sorted; none where there is no folder."""

    def commit(self, staging: Path, final: Path) -> None:
        """Makes a folder visible under its final name, durably and in one step; on a store, with its manifest.

        A folder that stands there already is replaced; `staging` is then the old one, for its owner to delete, or none.

        Raises:
            UserError: another writer commits to the same place, or a store failed meanwhile; a store alone says so. See
                pipeline.storage.staging.recover.
        """

    def lock(self, path: Path, shared: bool = False, wait: bool = False, create: bool = False) -> Lock:
        """Locks a file or folder; its content stays as it is.

        Args:
            shared: with other shared locks. wait: until it is free. create: an empty file where there is none.
        Raises:
            BlockingIOError: another process holds it, and `wait` is false.
            FileNotFoundError: it does not exist, or was replaced before the lock was had.
            OSError: with errno ELOOP, it is a link.
        """
