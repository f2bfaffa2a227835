"""Files on whatever storage a path belongs to: text and JSON written atomically, JSON lines appended, checksums."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage

# By the scheme of a URL; a path without one is local. Another storage is one more entry.
STORAGES: dict[str, Storage] = {"": LocalStorage()}


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
    """Adds one JSON line and flushes it to disk, after cutting off what a killed writer may have left of its last."""
    with path.open("ab+") as file:
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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete JSON lines of a file, none where it does not exist."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def sha256(path: Path) -> str:
    """Checksum of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
