"""What a file is now, in a few bytes that change with its content; and files that change only where they are still that."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.storage.files import storage_of
from pipeline.storage.objects import write_new
from pipeline.storage.patience import patiently
from pipeline.storage.store_path import StorePath

# Of a file: inode, time of change in ns and size; of an object its ETag where the store has one, else time and size.
Version = tuple[object, ...]


def version(path: Path) -> Version | None:
    """What a file is now; None where there is none."""
    if isinstance(path, StorePath):
        try:
            return _of_object(patiently(path, path.system.info, path.key))
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                raise
            return None
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def versions_below(folder: Path) -> dict[Path, Version]:
    """The version of every file of a folder on a store and of those in it: one listing, not one question a file."""
    assert isinstance(folder, StorePath)
    root = folder.key.rstrip("/")
    with suppress(FileNotFoundError):
        found = patiently(folder, folder.system.find, root, detail=True)
        names = (
            (folder.system._strip_protocol(key).removeprefix(root).strip("/"), info) for key, info in found.items()
        )
        return {folder / name: _of_object(info) for name, info in names if name}
    return {}


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
    if isinstance(path, StorePath) and path.scheme in ("s3", "s3a"):
        try:
            if known is None:
                write_new(path, content)
            else:
                patiently(path, path.system.pipe_file, path.key, content, IfMatch=known[0])
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EEXIST):
                raise
            if _content(path) != content:  # the answer to a put that was made may be lost, and the put repeated
                raise _changed(path) from None
        return
    if version(path) != known:
        raise _changed(path)
    storage_of(path).write(path, content)


def _content(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _changed(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
