"""A file of a checkpoint, written to a disk or sent to a store from memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.storage.object_files import S3
from pipeline.storage.patience import patiently
from pipeline.storage.store_path import StorePath, on_store
from pipeline.storage.uploading import uploading


@contextmanager
def sending(path: Path) -> Iterator[BinaryIO]:
    """A new file that is whole, and durable, when the block ends well.

    On a store its parts are on their way while it is written, a few at a time, and it is not there before all are.
    """
    if on_store(path):
        with uploading(path) as sent:
            yield sent
        return
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def abort_left(folder: Path) -> None:
    """Drops the uploads that killed writers have begun below a folder: a store keeps their parts, which no listing shows."""
    if not isinstance(folder, StorePath) or folder.scheme not in S3:
        return
    bucket, _, key = folder.key.partition("/")
    after: dict[str, str] = {}
    with suppress(OSError):  # not every server knows the calls
        while True:
            page = _call(folder, "list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **after)
            for left in page.get("Uploads", ()):
                with suppress(FileNotFoundError):  # it has just ended
                    _call(folder, "abort_multipart_upload", Bucket=bucket, Key=left["Key"], UploadId=left["UploadId"])
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _call(folder: StorePath, name: str, **named: Any) -> Any:
    return patiently(folder, folder.system.call_s3, name, **named)
