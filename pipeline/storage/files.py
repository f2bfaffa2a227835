"""Files on whatever storage a path belongs to: text and JSON written atomically, JSON lines appended, checksums."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from features.errors import UserError
from features.plain_json import parse_json
from features.regular_files import status_of
from pipeline.storage.base import Storage
from pipeline.storage.local import NO_LINK, LocalStorage

# By the scheme of a URL; a path without one is local. Another storage is one more entry.
STORAGES: dict[str, Storage] = {"": LocalStorage()}

MAX_LINE_BYTES = 16 << 20  # of a record in JSON lines


def storage_of(path: Path) -> Storage:
    """The storage that a path or URL belongs to. Raises ValueError for a scheme that none is registered for."""
    scheme, separator, _ = str(path).partition(":/")
    if (known := STORAGES.get(scheme if separator else "")) is None:
        raise ValueError(
            f"{path}: no storage for {scheme}:, there are local paths and {', '.join(filter(None, STORAGES))}"
        )
    return known


def write_text(path: Path, text: str) -> None:
    """Writes a text file durably and atomically."""
    storage_of(path).write(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file durably and atomically."""
    write_text(path, json_text(content, indent=1))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line and flushes it to disk, after cutting off what a killed writer may have left of its last.

    Raises:
        UserError: the file is a link, or no regular file.
    """
    with appending(path) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(max(0, end - (1 << 20)))
            tail = file.read()
            if not tail.endswith(b"\n"):
                file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        file.write(json_text(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def json_text(content: object, indent: int | None = None) -> str:
    """JSON in ASCII without control characters in texts; json.dumps leaves one as it is, DEL."""
    return json.dumps(content, indent=indent).replace("\x7f", "\\u007f")


def appending(path: Path) -> BinaryIO:
    """A file opened to append to and to read, made where there is none. Raises UserError for a link or no regular file."""
    return _regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, "ab+")


def _regular(path: Path, flags: int, mode: str) -> BinaryIO:
    """A regular file, opened without waiting at a pipe. Raises UserError for anything else, OSError."""
    with user_error_for_links(path):
        descriptor = os.open(path, flags | NO_LINK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file. Remove it.")
    return cast(BinaryIO, os.fdopen(descriptor, mode))


@contextmanager
def user_error_for_links(path: Path) -> Iterator[None]:
    """Turns the OSError of a link that is not followed, or of what is no file, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket, a folder
            raise
        kind = "a link, which is not followed" if error.errno == errno.ELOOP else "no regular file"
        raise UserError(f"{path} is {kind}. Remove it.") from None


def refuse_link(path: Path) -> Path:
    """The path of a folder of ours. Raises UserError for a link, also for one that leads nowhere."""
    if path.is_symlink():
        raise UserError(f"{path} is a link, which is not followed. Replace it by what it stands for, or remove it.")
    return path


def make_folder(path: Path) -> Path:
    """Makes a folder of ours where there is none, and those above it; returns it.

    Raises:
        UserError: it is a link or a file: what is written into it would lie elsewhere.
    """
    refuse_link(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file, where a folder belongs. Remove it.") from None
    return path


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete JSON lines of a file, none where it does not exist.

    Raises:
        UserError: it is a link or no regular file, or a line is no JSON object or longer than MAX_LINE_BYTES.
    """
    if status_of(path.parent, path.name) is None:
        return
    with open_regular(path) as file:
        number = 0
        while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            number += 1
            record = parse_json(line, f"{path}, line {number}", strict=False)  # a loss may be NaN
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: no JSON object. Remove it.")
            yield record
        if len(line) == MAX_LINE_BYTES:
            raise UserError(f"{path}, line {number + 1}: longer than {MAX_LINE_BYTES:,} bytes. Remove it.")


def open_regular(path: Path) -> BinaryIO:
    """A file opened to read. Raises UserError for a link, a pipe or whatever else is no regular file, OSError."""
    return _regular(path, os.O_RDONLY, "rb")


def sha256(path: Path) -> str:
    """Checksum of a file's content, in hex. Raises UserError, OSError as open_regular."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
