"""A cache of parts of files on a local disk, limited in size, shared by processes without a lock."""

import hashlib
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from features.errors import UserError, one_line
from features.regular_files import NO_LINK

logger = logging.getLogger(__name__)

DIGEST_BYTES = 32
SUFFIX, UNNAMED = ".cached", ".unnamed"  # of entries, and of those that are being written
PARTS = 4  # of the limit: as much may be written between two listings of the folder


class DiskCache:
    """Entries by name, each a file of a checksum and its content.

    They appear whole, under their name, so that any number of processes write and read side by side. An entry that is damaged
    is none. Those not read for the longest time are deleted, so that all together keep to the limit; other files of the folder
    are neither counted nor deleted.

    Args:
        folder: of a local disk; made where there is none.
        limit: bytes of all entries, other processes' too.
        writers: processes that write to it.
    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, limit: int, writers: int = 1) -> None:
        self.folder, self.limit, self.writers = folder, limit, writers
        self.share = limit // PARTS // writers
        # Bytes since old entries were deleted: what earlier processes have left may be too much.
        self.written = self.share
        self.is_full = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write("probe", b"")
            self._path("probe").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"train.cache={folder}: cannot be written ({one_line(error)}). Name another folder."
            ) from None

    def get(self, name: str) -> bytes | None:
        """An entry's content, None where there is none, or a damaged one."""
        path = self._path(name)
        try:
            with os.fdopen(os.open(path, NO_LINK), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return None
                digest, content = file.read(DIGEST_BYTES), file.read()
        except OSError:
            return None
        if digest != _digest(name, content):
            logger.warning(f"{path}: damaged; it is fetched again")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return content

    def put(self, name: str, content: bytes) -> None:
        """Adds an entry, if there is room for it. A disk that is full, or fails, ends that: one warning, and no error."""
        size = len(content) + DIGEST_BYTES
        if self.is_full:
            return
        if size > self.share:
            self.is_full = True
            logger.warning(
                f"train.cache_bytes={self.limit:,} is too small for entries of {size:,} bytes by {self.writers} writers: "
                f"nothing is cached. Allow {size * PARTS * self.writers:,}."
            )
            return
        try:
            if self.written + size > self.share:
                self._delete_old()
                self.written = 0
            self.written += size
            self._write(name, content)
        except OSError as error:
            self.is_full = True
            logger.warning(f"train.cache={self.folder}: nothing more is cached ({one_line(error)})")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{uuid4().hex}{UNNAMED}"
        try:
            with temporary.open("xb") as file:
                file.write(_digest(name, content))
                file.write(content)
            temporary.rename(self._path(name))
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _delete_old(self) -> None:
        """Deletes the entries that were read or written the longest time ago, until each writer's share is free."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.endswith((SUFFIX, UNNAMED)):
                    continue
                with suppress(FileNotFoundError):  # deleted by another process
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append((status.st_mtime_ns, entry.name, status.st_size))
        total = sum(size for *_, size in found)
        for _, name, size in sorted(found):
            if total <= self.limit - self.limit // PARTS:
                return
            with suppress(FileNotFoundError):
                (self.folder / name).unlink()
            total -= size


def _digest(name: str, content: bytes) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(content)
    return digest.digest()
