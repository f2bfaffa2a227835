"""Files on whatever storage a path belongs to: text and JSON written atomically, JSON lines appended, checksums."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from features.errors import UserError
from features.plain_json import parse_json
from features.regular_files import open_regular, refuse_link
from pipeline.storage import store_path
from pipeline.storage.base import Storage
from pipeline.storage.conditional import Changed, read_version, write_new, write_over
from pipeline.storage.local import LocalStorage
from pipeline.storage.objects import ObjectStorage
from pipeline.storage.store_path import STORES, StorePath
from pipeline.storage.uploading import uploading

# By the scheme of a URL; a path without one is local. Another storage is one more entry.
STORAGES: dict[str, Storage] = {"": LocalStorage(), **dict.fromkeys(STORES, ObjectStorage())}

MAX_RECORD_BYTES = 16 << 20  # of a record in JSON lines
COPIED_BYTES = 8 << 20  # at a time


def storage_of(path: Path) -> Storage:
    """The storage that a path belongs to, see pipeline.storage.store_path.place."""
    return STORAGES[path.scheme if isinstance(path, StorePath) else ""]


def write_text(path: Path, text: str) -> None:
    """Writes a text file durably and atomically."""
    storage_of(path).write(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file durably and atomically."""
    write_text(path, json_text(content, indent=1))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line and flushes it to disk, after cutting off what a killed writer may have left of its last.

    On a store the whole file is written again; a line that another writer adds meanwhile is kept, by a condition where the
    store has it (S3). Who appends often collects lines first.

    Raises:
        UserError: the file is a link, or no regular file.
    """
    if isinstance(path, StorePath):
        return _append_on_store(path, json_text(record).encode() + b"\n")
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
    return None


def _append_on_store(path: StorePath, line: bytes) -> None:
    while True:
        found = read_version(path)
        with suppress(Changed, FileExistsError):
            if found is None:
                write_new(path, line)
            else:
                content, version = found
                write_over(path, content[: content.rfind(b"\n") + 1] + line, version)
            return


def json_text(content: object, indent: int | None = None) -> str:
    """JSON in ASCII without control characters in texts; json.dumps leaves one as it is, DEL."""
    return json.dumps(content, indent=indent).replace("\x7f", "\\u007f")


def appending(path: Path) -> BinaryIO:
    """A file opened to append to and to read, made where there is none. Raises UserError for a link or no regular file."""
    return open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, "ab+")


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
        UserError: it is a link or no regular file, or a line is no JSON object or longer than MAX_RECORD_BYTES.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    number = 0
    with file:
        while (line := file.readline(MAX_RECORD_BYTES)).endswith(b"\n"):
            number += 1
            try:
                record = parse_json(line, f"{path}, line {number}", strict=False)  # a loss may be NaN
            except UserError as error:
                raise UserError(f"{error}. Remove it.") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: no JSON object. Remove it.")
            yield record
        if len(line) == MAX_RECORD_BYTES:
            raise UserError(f"{path}, line {number + 1}: longer than {MAX_RECORD_BYTES:,} bytes. Remove it.")


def whole(path: Path) -> Path | BinaryIO:
    """What a library that knows no stores reads a file from, all of it: its path, or of a file on a store its content."""
    return io.BytesIO(path.read_bytes()) if isinstance(path, StorePath) else path


def sha256(path: Path) -> str:
    """Checksum of a file's content, in hex. Raises UserError, OSError as open_regular."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_tree(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it, if it is there.

    What cannot be deleted of a mounted folder stays, without an error.

    Raises:
        OSError: a file cannot be deleted, or a store refuses or does not answer.
    """
    if isinstance(path, StorePath):
        store_path.remove_tree(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content, which appears at the target whole: piece by piece between any two places.

    Raises:
        UserError: the source is a link or no regular file.
    """
    if isinstance(source, StorePath) and isinstance(target, StorePath) and source.system == target.system:
        store_path.copy(source, target)
    else:
        with open_regular(source) as content, uploading(target) as file:
            shutil.copyfileobj(content, file, COPIED_BYTES)
