"""Storage on an object store that fsspec reaches: objects appear whole, a manifest comes last, leases stand for locks."""

import errno
from contextlib import suppress
from pathlib import Path

from pipeline.storage.base import Lock
from pipeline.storage.lease import lease
from pipeline.storage.patience import patiently
from pipeline.storage.store_path import StorePath, copy, files_below, remove_tree

MANIFEST = "manifest.json"  # of a folder that is committed: it exists once this does


class ObjectStorage:
    """See pipeline.storage.base.Storage."""

    def read(self, path: Path) -> bytes:
        """A file's content."""
        return path.read_bytes()

    def write(self, path: Path, content: bytes) -> None:
        """Writes an object, whole or not at all."""
        path.write_bytes(content)

    def list(self, folder: Path, pattern: str) -> list[Path]:
        """Entries of a folder that match a glob pattern, sorted."""
        return sorted(folder.glob(pattern))

    def commit(self, staging: Path, final: Path) -> None:
        """Copies a folder's files within the store, its manifest last; one that stands there is deleted, its manifest first."""
        assert isinstance(staging, StorePath)
        assert isinstance(final, StorePath)
        with suppress(FileNotFoundError):
            (final / MANIFEST).unlink()
        remove_tree(final)
        files = files_below(staging)
        for file in sorted(files, key=lambda file: file == staging / MANIFEST):
            copy(file, final / str(file).removeprefix(f"{staging}/"))
        remove_tree(staging)

    def lock(self, path: Path, shared: bool = False, wait: bool = False, create: bool = False) -> Lock:
        """A lease on a file, see pipeline.storage.lease; nothing is created at the path itself."""
        assert isinstance(path, StorePath)
        if not create and not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return lease(path, shared, wait)


def write_new(path: StorePath, content: bytes) -> None:
    """Writes an object where there is none, by a conditional put where the store has it. Raises FileExistsError."""
    try:
        patiently(path, path.system.pipe_file, path.key, content, mode="create")
    except OSError as error:
        if error.errno == errno.EINVAL:  # as s3fs answers a put whose condition does not hold
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        raise
