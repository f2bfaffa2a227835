"""Storage on an object store that fsspec reaches: objects appear whole, a manifest comes last, leases stand for locks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from features.errors import UserError, one_line
from pipeline.storage.base import Lock
from pipeline.storage.conditional import content_of, write_new
from pipeline.storage.lease import Lease, lease, lost_here
from pipeline.storage.patience import missing
from pipeline.storage.store_path import StorePath, copy_all, files_below, remove_all, remove_tree

_logger = logging.getLogger(__name__)

__all__ = ["MANIFEST", "ObjectStorage", "write_new"]

MANIFEST = "manifest.json"  # of a folder that is committed: it exists once this does
COMMITTING = ".committing"  # in a staging folder that is whole, from before a commit of it changes its final place


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
        """Copies a folder's files within the store, several at a time and its manifest last; then deletes it.

        Where a folder stands at `final` its manifest is deleted first: from there until the new one is put nothing is committed
        there, and no reader that begins with the manifest sees a mixture; one that has begun may meet the new files, which its
        manifest's checksums refuse. A commit that fails or is killed leaves, at `final`, the folder before, files without a
        manifest, or the new folder; in the second case `staging` is whole and `is_unfinished`, and is to be committed again.
        Without a manifest (MANIFEST) in `staging` readers see files as they come, and nothing says that it is unfinished.

        Raises:
            UserError: another writer has committed to `final` meanwhile, or taken the lock: nothing of this one is there. Or
                the store refuses or does not answer, and `final` is left as above.
        """
        assert isinstance(staging, StorePath)
        assert isinstance(final, StorePath)
        with _sole_writer(final) as lock:
            try:
                _move(staging, final, lock)
            except OSError as error:
                raise UserError(
                    f"{final} is not written to its end: {one_line(error)}. Run this again: it first ends what was begun."
                ) from None
        with suppress(OSError):  # what stays is removed by the next process
            (staging / MANIFEST).unlink(missing_ok=True)  # first: a half of it is not to be committed again
            remove_tree(staging)

    def lock(self, path: Path, shared: bool = False, wait: bool = False, create: bool = False) -> Lock:
        """A lease beside a file, see pipeline.storage.lease; a folder need have no file of its own, but one below it.

        Whoever may only read gets no lease: a shared lock then keeps nobody from deleting the file, and the log says so.
        """
        assert isinstance(path, StorePath)
        if not path.exists():
            if not create:
                raise missing(path)
            with suppress(FileExistsError):
                write_new(path, b"")
        try:
            taken: Lock = lease(path, shared, wait)
        except PermissionError as error:
            if not shared:
                raise
            _logger.warning("%s is read without a lock, since it cannot be written beside it: %s", path, error.strerror)
            return _ReadOnly()
        if not path.exists():
            taken.release()
            raise missing(path)
        return taken


def is_unfinished(staging: StorePath, final: StorePath) -> bool:
    """Whether a commit has begun to change `final` and not ended; all files are in `staging` then. Raises OSError."""
    whole = (staging / COMMITTING).exists() and (staging / MANIFEST).exists()
    return whole and not (final / MANIFEST).exists()


def _move(staging: StorePath, final: StorePath, lock: Lease) -> None:
    def still_ours() -> None:
        if lock.lost or lost_here(staging):
            raise _other_writer(final)

    still_ours()
    files = [file for file in files_below(staging) if file != staging / COMMITTING]
    names = {file.parts[len(staging.parts) :] for file in files}
    manifest = content_of(staging / MANIFEST)
    if manifest is not None:
        (staging / COMMITTING).write_bytes(b"")
    (final / MANIFEST).unlink(missing_ok=True)
    remove_all([left for left in files_below(final) if left.parts[len(final.parts) :] not in names])
    pairs = [(file, final.joinpath(*file.parts[len(staging.parts) :])) for file in files]
    copy_all([pair for pair in pairs if pair[0] != staging / MANIFEST], before_each=still_ours)
    still_ours()
    if manifest is not None:
        try:
            write_new(final / MANIFEST, manifest)
        except FileExistsError:
            raise _other_writer(final) from None


class _ReadOnly:
    """The lock of who may not write a lease."""

    lost = False

    def release(self) -> None:
        """Nothing."""

    def __enter__(self) -> "_ReadOnly":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def _sole_writer(final: StorePath) -> Iterator[Lease]:
    try:
        lock = lease(final)
    except BlockingIOError:
        raise _other_writer(final) from None
    with lock:
        yield lock


def _other_writer(final: StorePath) -> UserError:
    return UserError(f"{final} is being written by another process: let it end, then run this again.")
