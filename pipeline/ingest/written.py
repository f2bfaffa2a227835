"""Files of the dataset as they are written: whole and durable, with their checksums."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.dataset.manifest import footer_sha256
from pipeline.storage.files import sha256
from pipeline.storage.local import fsync
from pipeline.storage.store_path import StorePath
from pipeline.storage.uploading import uploading


class Written:
    """A file that was written: its size and checksums, which are read from it where they were not made on the way.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, hashed: "Hashed | None" = None) -> None:
        self.path, self.hashed = path, hashed

    @cached_property
    def bytes(self) -> int:
        """Its size."""
        return self.hashed.size if self.hashed else self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Checksum of its content, in hex."""
        return self.hashed.digest.hexdigest() if self.hashed else sha256(self.path)

    @cached_property
    def footer_sha256(self) -> str:
        """Of a Parquet file, see pipeline.dataset.manifest.footer_sha256."""
        return footer_sha256(self.path)


class Hashed(io.RawIOBase):
    """A file that is written from its beginning to its end, with the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Writes all of it."""
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        """How much was written."""
        return self.size

    def writable(self) -> bool:
        """Yes."""
        return True


@contextmanager
def written_whole(path: Path, durable: bool = True) -> Iterator[tuple[Any, Written]]:
    """What a writer of Arrow or Parquet takes to write a file, and what is known of it after the block.

    On a store the file appears when the block ends well.

    Args:
        durable: whether it is flushed to disk.
    """
    if not isinstance(path, StorePath):
        yield path, Written(path)
        if durable:
            fsync(path)
        return
    with uploading(path) as file:
        hashed = Hashed(file)
        yield hashed, Written(path, hashed)
