"""What a file is now, in a few bytes that change with its content; and files that change only where they are still that."""

import errno
import os
from pathlib import Path
from typing import Any

from pipeline.storage.conditional import Changed, write_new, write_over
from pipeline.storage.files import storage_of
from pipeline.storage.object_files import S3
from pipeline.storage.store_path import StorePath, described_below

# Of a file: inode, time of change in ns and size; of an object its ETag where the store has one, else time and size.
Version = tuple[object, ...]


def version(path: Path) -> Version | None:
    """What a file is now; None where there is none. Raises OSError where a store does not answer."""
    if isinstance(path, StorePath):
        info = path.describe()
        return _of_object(info) if info and info["type"] == "file" else None
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def versions_below(folder: Path) -> dict[Path, Version]:
    """The version of every file of a folder on a store and of those in it: one listing, not one question a file."""
    assert isinstance(folder, StorePath)
    return {file: _of_object(info) for file, info in described_below(folder).items()}


def _of_object(info: dict[str, Any]) -> Version:
    tag = next((info[key] for key in ("ETag", "etag", "content_md5", "md5Hash") if info.get(key)), None)
    if tag is not None:
        return (str(tag),)
    changed = next((info[key] for key in ("LastModified", "last_modified", "mtime", "created") if info.get(key)), 0)
    return changed.timestamp() if hasattr(changed, "timestamp") else changed, info.get("size") or 0


def replace_version(path: Path, content: bytes, known: Version | None) -> None:
    """Writes a file that is still of the version `known`, None: that is not there.

    On S3 the put has a condition, so that of two writers one fails; elsewhere the version is compared just before, and a lock
    must keep others away meanwhile.

    Raises:
        FileExistsError: it is of another version by now.
    """
    if isinstance(path, StorePath) and known is None:
        write_new(path, content)
    elif isinstance(path, StorePath) and path.scheme in S3:
        try:
            write_over(path, content, str(known and known[0]))
        except Changed:
            raise _changed(path) from None
    elif version(path) != known:
        raise _changed(path)
    else:
        storage_of(path).write(path, content)


def _changed(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
