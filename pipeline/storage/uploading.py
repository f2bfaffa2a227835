"""A file that is written piece by piece and appears whole, on a mounted file system or a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.storage.local import replacing
from pipeline.storage.store_path import StorePath


@contextmanager
def uploading(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when the block ends well, and not at all when it raises."""
    if not isinstance(path, StorePath):
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
            file.flush()
        return
    import io

    content = io.BytesIO()
    yield cast(BinaryIO, content)
    path.write_bytes(content.getvalue())
