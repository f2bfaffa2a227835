"""File objects over an object of a store: read by ranges, and written by parts; each request is repeated, see patience."""

import errno
import io
import os
import threading
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import fsspec

from pipeline.storage.patience import patiently, patiently_for

READ_BYTES = 4 << 20  # at least, of a request for a range
PART_BYTES = (
    16 << 20
)  # of a part that is uploaded; twice as much after every GROWN_AFTER parts, of which S3 takes 10,000
GROWN_AFTER = 1000
PARTS_AT_ONCE = 4
DISCARD_S = 5.0  # for which an upload that is given up waits for a store that does not answer
S3 = ("s3", "s3a")


class ObjectReader(io.RawIOBase):
    """An object's bytes, fetched by ranges where they are read. Raises OSError.

    Args:
        name: for errors. key: as the file system takes it. size: in bytes.
    """

    def __init__(self, name: str, system: fsspec.AbstractFileSystem, key: str, size: int) -> None:
        self.name, self.system, self.key, self.size, self.position = name, system, key, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        self.position = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence])
        return self.position

    def tell(self) -> int:
        """The position."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Reads as much as there is, up to the size of the buffer."""
        view = memoryview(buffer).cast("B")
        end = min(self.size, self.position + len(view))
        if end <= self.position:
            return 0
        found = patiently(self.name, self.system.cat_file, self.key, start=self.position, end=end)
        if len(found) != end - self.position:
            raise OSError(errno.EIO, f"{len(found):,} bytes where {end - self.position:,} were asked for", self.name)
        view[: len(found)] = found
        self.position = end
        return len(found)


class ObjectWriter(io.RawIOBase):
    """A file that becomes an object when it is committed, and none when it is discarded or dropped. Raises OSError.

    S3: parts are uploaded beside the writing, PARTS_AT_ONCE of them; elsewhere an object under a name of its own is moved.

    Args:
        commits: when it is closed; else `close` by those who are handed the file does nothing.
    """

    def __init__(self, name: str, system: fsspec.AbstractFileSystem, scheme: str, key: str, commits: bool) -> None:
        self.name, self.key, self.commits, self.done, self.size = name, key, commits, False, 0
        self.content = bytearray()
        self.upload: _Parts | _Aside = (_Parts if scheme in S3 else _Aside)(name, system, key)

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes written."""
        return self.size

    def write(self, data: Any) -> int:
        """Takes all of it."""
        if self.done:
            raise ValueError(f"{self.name} is closed")
        view = memoryview(data).cast("B")
        size = len(view)
        self.size += size
        while len(view):
            taken = view[: max(1, self.upload.part_bytes - len(self.content))]
            self.content += taken
            view = view[len(taken) :]
            if len(self.content) >= self.upload.part_bytes:
                self.upload.add(self.content)
                self.content = bytearray()
        return size

    def commit(self) -> None:
        """Makes the object appear whole."""
        if not self.done:
            self.done = True
            try:
                self.upload.finish(self.content, self.size)
            except BaseException:
                self.upload.drop()
                raise
            self.content = bytearray()

    def discard(self) -> None:
        """Leaves nothing, neither an object nor parts."""
        if not self.done:
            self.done = True
            self.content = bytearray()
            self.upload.drop()

    def close(self) -> None:
        """Commits it, where that is how it was opened."""
        if self.commits:
            self.commit()
            super().close()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "done", True):
            self.done = True
            with suppress(RuntimeError):  # the process ends
                # Of its own: the garbage collector runs in any thread, also in the one that asks the store.
                threading.Thread(target=self.upload.drop, name="discard", daemon=True).start()


class TextWriter(io.TextIOWrapper):
    """Text into an ObjectWriter, which is discarded when its `with` block raises."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            raw: Any = self.buffer
            raw.discard()
            return
        super().__exit__(kind, *rest)


class _Parts:
    """A multipart upload to S3, by the calls of its API; a small object is put at once."""

    def __init__(self, name: str, system: Any, key: str) -> None:
        self.name, self.system, self.id = name, system, ""
        bucket, _, rest = key.partition("/")
        self.place = {"Bucket": bucket, "Key": rest}
        self.count, self.part_bytes = 0, PART_BYTES
        self.pool: ThreadPoolExecutor | None = None
        self.running: deque[Future[str]] = deque()
        self.tags: list[str] = []

    def call(self, method: str, **named: Any) -> Any:
        return patiently(self.name, self.system.call_s3, method, **self.place, **named)

    def add(self, content: bytearray) -> None:
        if self.pool is None:
            self.id = self.call("create_multipart_upload")["UploadId"]
            self.pool = ThreadPoolExecutor(PARTS_AT_ONCE, "upload")
        if len(self.running) >= PARTS_AT_ONCE:
            self.tags.append(self.running.popleft().result())
        self.count += 1
        self.part_bytes = PART_BYTES << (self.count // GROWN_AFTER)
        self.running.append(self.pool.submit(self.send, self.count, content))

    def send(self, number: int, content: bytearray) -> str:
        return str(self.call("upload_part", UploadId=self.id, PartNumber=number, Body=content)["ETag"])

    def finish(self, content: bytearray, size: int) -> None:
        if self.pool is None:
            self.call("put_object", Body=bytes(content))
            return
        if content:
            self.add(content)
        while self.running:
            self.tags.append(self.running.popleft().result())
        self.pool.shutdown()
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(self.tags, 1)]
        try:
            self.call("complete_multipart_upload", UploadId=self.id, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # no such upload: it may be complete, and the answer was lost
            found = self.call("head_object")
            if found["ContentLength"] != size or not found["ETag"].strip('"').endswith(f"-{len(parts)}"):
                raise
        self.id = ""

    def drop(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)  # a part that comes later would stay
        if self.id:
            with suppress(OSError):
                patiently_for(
                    DISCARD_S, self.name, self.system.call_s3, "abort_multipart_upload", UploadId=self.id, **self.place
                )
            self.id = ""


class _Aside:
    """An object under a name of its own, which is then copied within the store; its writing is as patient as fsspec is."""

    part_bytes = PART_BYTES

    def __init__(self, name: str, system: Any, key: str) -> None:
        self.name, self.system, self.key, self.file = name, system, key, None
        folder, _, last = key.rpartition("/")
        self.aside = f"{folder}/.{last}.{uuid.uuid4().hex}"

    def add(self, content: bytearray) -> None:
        if self.file is None:
            self.file = patiently(self.name, self.system.open, self.aside, "wb")
        self.file.write(bytes(content))  # type: ignore[attr-defined]

    def finish(self, content: bytearray, size: int) -> None:  # noqa: ARG002
        if self.file is None:
            patiently(self.name, self.system.pipe_file, self.key, bytes(content))
            return
        self.file.write(bytes(content))
        self.file.close()
        patiently(self.name, self.system.cp_file, self.aside, self.key)
        patiently(self.name, self.system.rm_file, self.aside)

    def drop(self) -> None:
        if self.file is not None:
            with suppress(Exception):  # what stays is a hidden file that nobody reads
                self.file.close()
            with suppress(OSError):
                patiently_for(DISCARD_S, self.name, self.system.rm_file, self.aside)
