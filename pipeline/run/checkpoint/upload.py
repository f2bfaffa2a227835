"""A file of a checkpoint, sent to a store from memory: parts of it side by side, and a bounded number of them at a time."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from pipeline.storage.patience import patiently
from pipeline.storage.store_path import StorePath, on_store
from pipeline.storage.uploading import uploading

PART_BYTES = 16 << 20
PARTS = 8  # of a file that are on their way: PARTS + 1 times PART_BYTES are in memory
MOST_PARTS = 9_000  # of a file; S3 has 10,000
MULTIPART = ("s3", "s3a")


class Sink(Protocol):
    """What a file's content is written to."""

    def write(self, block: Any, /) -> int:
        """Appends."""

    def tell(self) -> int:
        """Bytes so far."""


@contextmanager
def sending(path: Path, size: int) -> Iterator[Sink]:
    """A new file that is whole, and durable, when the block ends well; on a store it is not there before.

    Args:
        size: of the whole, about.
    """
    if not on_store(path):
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    assert isinstance(path, StorePath)
    if path.scheme not in MULTIPART:  # one part after the other
        with uploading(path) as whole:
            yield whole
        return
    upload = Upload(path, max(PART_BYTES, -(-size // MOST_PARTS)))
    try:
        yield upload
        upload.finish()
    except BaseException:
        upload.abort()
        raise


class Upload:
    """A multipart upload: nothing stands at the path before `finish`. A file of less than a part is put at once.

    Args:
        part_bytes: the size of all parts but the last.
    """

    def __init__(self, path: StorePath, part_bytes: int) -> None:
        self.path, self.part_bytes = path, part_bytes
        bucket, key, _ = path.system.split_path(path.key)
        self.object = {"Bucket": bucket, "Key": key}
        self.part, self.sent = bytearray(), 0
        self.upload: str | None = None
        self.pool = ThreadPoolExecutor(PARTS, "upload")
        self.waiting: deque[Future[str]] = deque()
        self.tags: list[str] = []

    def tell(self) -> int:
        """Bytes so far."""
        return self.sent + len(self.part)

    def write(self, block: Any) -> int:
        """Appends; waits while PARTS parts are on their way. Raises OSError where one could not be sent."""
        content = memoryview(block).cast("B")
        done = 0
        while done < len(content):
            piece = content[done : done + self.part_bytes - len(self.part)]
            self.part += piece
            done += len(piece)
            if len(self.part) == self.part_bytes:
                self._send()
        return done

    def finish(self) -> None:
        """Makes the file of the parts."""
        if self.upload is None:
            self.path.write_bytes(self.part)
            self.pool.shutdown()
            return
        if self.part:
            self._send()
        while self.waiting:
            self.tags.append(self.waiting.popleft().result())
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(self.tags, 1)]
        try:
            self._call("complete_multipart_upload", UploadId=self.upload, MultipartUpload={"Parts": parts})
        except OSError:
            # It may have been completed by a call whose answer was lost: no upload has this id any more.
            if not self.path.is_file() or self.path.stat().st_size != self.sent:
                raise
        self.pool.shutdown()

    def abort(self) -> None:
        """Drops what was sent; what cannot be dropped, since the store is away, `abort_left` finds."""
        self.pool.shutdown(cancel_futures=True)
        if self.upload is not None:
            with suppress(OSError):
                self.path.system.call_s3("abort_multipart_upload", **self.object, UploadId=self.upload)

    def _send(self) -> None:
        if self.upload is None:
            self.upload = self._call("create_multipart_upload")["UploadId"]
        if len(self.waiting) == PARTS:
            self.tags.append(self.waiting.popleft().result())
        number = len(self.tags) + len(self.waiting) + 1
        self.waiting.append(self.pool.submit(self._send_part, number, bytes(self.part)))
        self.sent += len(self.part)
        self.part.clear()

    def _send_part(self, number: int, content: bytes) -> str:
        answer = self._call("upload_part", UploadId=self.upload, PartNumber=number, Body=content)
        return str(answer["ETag"])

    def _call(self, what: str, **arguments: Any) -> Any:
        return patiently(self.path, self.path.system.call_s3, what, **self.object, **arguments)


def abort_left(folder: Path) -> None:
    """Drops the uploads that killed writers have begun below a folder: a store keeps their parts, which are in no listing."""
    if not isinstance(folder, StorePath) or folder.scheme not in MULTIPART:
        return
    bucket, key, _ = folder.system.split_path(folder.key)
    call = folder.system.call_s3
    with suppress(OSError):  # not every server knows the call
        found = patiently(folder, call, "list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/").get("Uploads", [])
        for left in found:
            call("abort_multipart_upload", Bucket=bucket, Key=left["Key"], UploadId=left["UploadId"])
