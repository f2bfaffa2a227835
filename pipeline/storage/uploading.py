"""A file that is written piece by piece and appears whole, on a mounted file system or a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.storage.local import replacing
from pipeline.storage.object_files import ObjectWriter
from pipeline.storage.store_path import StorePath


@contextmanager
def uploading(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when the block ends well, and not at all when it raises.

    On a mounted file system it is written beside `path` and renamed; on S3 large files are uploaded in parts while they are
    written. Closing it in the block changes nothing. What a killed writer leaves: a hidden file `.NAME.HEX`, or on S3 an
    unfinished multipart upload, which no list shows and a rule of the bucket should expire.

    Raises:
        OSError: it cannot be written.
    """
    if not isinstance(path, StorePath):
        with replacing(path) as temporary, temporary.open("wb") as file:
            yield file
        return
    writer = ObjectWriter(str(path), path.system, path.scheme, path.key, commits=False)
    try:
        yield cast(BinaryIO, writer)
    except BaseException:
        writer.discard()
        raise
    writer.commit()
