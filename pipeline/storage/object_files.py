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
from fsspec.asyn import sync

from pipeline.storage.patience import patiently, patiently_for

READ_BYTES = 4 << 20  # at least, of a request for a range
LARGE_BYTES = 64 << 20  # of an object that is read by several requests at once
READS_AT_ONCE = 4  # of a file that is read from begin to end
# Of a part that is uploaded; twice as much after every GROWN_AFTER parts, of which S3 takes 10,000.
PART_BYTES = 16 << 20
GROWN_AFTER = 1000
PARTS_AT_ONCE = 4
DISCARD_S = 5.0  # for which an upload that is given up waits for a store that does not answer
S3 = ("s3", "s3a")


class ObjectReader(io.RawIOBase):
    """An object's bytes, fetched by ranges where they are read. Raises OSError.

    A file that is read from its begin to its end is fetched READS_AT_ONCE ranges ahead. On S3 all are of the version that was
    opened: once another is put a range raises OSError (ESTALE).

    Args:
        name: for errors. key: as the file system takes it. size: in bytes.
        version: S3's ETag, None: not compared.
    """

    def __init__(
        self, name: str, system: fsspec.AbstractFileSystem, key: str, size: int, version: str | None = None
    ) -> None:
        self.name, self.system, self.key, self.size, self.version = name, system, key, size, version
        self.position, self.next, self.ahead_end = 0, 0, 0
        self.ahead: deque[tuple[int, Future[bytes]]] = deque()
        self.pool: ThreadPoolExecutor | None = None

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
        if self.position == self.next and self.position and len(view) >= READ_BYTES:
            found = self._with_those_ahead(end)
        else:
            self._forget()
            found = self._fetch(self.position, end)
        view[: len(found)] = found
        self.position += len(found)
        self.next = self.position
        return len(found)

    def readall(self) -> bytes:
        """All that is left, by few requests; the method of RawIOBase asks for 8 kB at a time."""
        buffer, parts = bytearray(READ_BYTES), []
        while count := self.readinto(buffer):
            parts.append(bytes(buffer[:count]))
        return b"".join(parts)

    def _with_those_ahead(self, end: int) -> bytes:
        """The range at the position, up to `end`, while those after it are on their way."""
        if self.ahead and self.ahead[0][0] != self.position:
            self._forget()
        self.pool = self.pool or ThreadPoolExecutor(READS_AT_ONCE, "read")
        step = end - self.position
        start = self.position if not self.ahead else self.ahead_end
        while start < self.size and len(self.ahead) < READS_AT_ONCE:
            self.ahead_end = min(self.size, start + step)
            self.ahead.append((start, self.pool.submit(self._fetch, start, self.ahead_end)))
            start = self.ahead_end
        try:
            found = self.ahead[0][1].result()
        except BaseException:
            self._forget()  # who reads again asks again
            raise
        if len(found) > step:  # of a larger buffer before
            self._forget()
            return found[:step]
        self.ahead.popleft()
        return found

    def _fetch(self, start: int, end: int) -> bytes:
        found: bytes = patiently(self.name, self._ask, start, end)
        if len(found) != end - start:
            raise OSError(errno.EIO, f"{len(found):,} bytes where {end - start:,} were asked for", self.name)
        return found

    def _ask(self, start: int, end: int) -> bytes:
        if self.version is None:
            return bytes(self.system.cat_file(self.key, start=start, end=end))
        bucket, _, key = self.key.partition("/")
        return read_pinned(
            self.system, self.name, self.version, Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}"
        )

    def _forget(self) -> None:
        while self.ahead:
            self.ahead.popleft()[1].cancel()

    def close(self) -> None:
        """Waits for nothing that is on its way."""
        self._forget()
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None
        super().close()


def read_pinned(system: Any, name: str, version: str, **named: str) -> bytes:
    """A range of an object of S3 that is still of a version. Raises OSError: ESTALE where it is not."""
    try:
        return _get(system, None, IfMatch=version, **named)[0] or b""
    except OSError as error:
        if error.errno == errno.EINVAL:  # s3fs answers a failed condition so, and a range beyond the end
            raise OSError(errno.ESTALE, "it changed while it was read", name) from None
        raise


def read_whole(system: Any, key: str) -> tuple[bytes, str]:
    """An object of S3 and its ETag, a small one by one request, where s3fs asks for the size first. Raises OSError."""
    bucket, _, rest = key.partition("/")
    content, version = _get(system, LARGE_BYTES, Bucket=bucket, Key=rest)
    return system.cat_file(key) if content is None else content, version


def _get(system: Any, most: int | None, **named: str) -> tuple[bytes | None, str]:
    """An object's content, None of one of more than `most` bytes, and its ETag."""

    async def get() -> tuple[bytes | None, str]:
        answer = await system._call_s3("get_object", **named)
        try:
            if most is not None and answer["ContentLength"] > most:
                return None, str(answer["ETag"])
            return bytes(await answer["Body"].read()), str(answer["ETag"])
        finally:
            answer["Body"].close()

    found: tuple[bytes | None, str] = sync(system.loop, get)
    return found


class ObjectWriter(io.RawIOBase):
    """A file that becomes an object when it is committed, and none when it is discarded or dropped. Raises OSError.

    S3: parts are uploaded beside the writing, PARTS_AT_ONCE of them; elsewhere an object under a name of its own is moved.

    Args:
        commits: when it is closed; else `close` by those who are handed the file does nothing.
    """

    def __init__(self, name: str, system: fsspec.AbstractFileSystem, scheme: str, key: str, commits: bool) -> None:
        self.name, self.key, self.commits, self.done, self.size = name, key, commits, False, 0
        self.content = bytearray()
        kind = _MultipartUpload if scheme in S3 else _TemporaryObject
        self.upload: _MultipartUpload | _TemporaryObject = kind(name, system, key)

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes written."""
        return self.size

    def write(self, data: Any) -> int:
        """Takes all of it. An error discards the file."""
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
                try:
                    self.upload.add(self.content)
                except BaseException:
                    self.discard()  # else a `close` would commit what lacks this part
                    raise
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


class _MultipartUpload:
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


class _TemporaryObject:
    """An object under a name of its own, which is then copied within the store; its writing is as patient as fsspec is."""

    part_bytes = PART_BYTES

    def __init__(self, name: str, system: Any, key: str) -> None:
        self.name, self.system, self.key, self.file = name, system, key, None
        folder, _, last = key.rpartition("/")
        self.temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"

    def add(self, content: bytearray) -> None:
        if self.file is None:
            self.file = patiently(self.name, self.system.open, self.temporary, "wb")
        self.file.write(bytes(content))  # type: ignore[attr-defined]

    def finish(self, content: bytearray, size: int) -> None:  # noqa: ARG002
        if self.file is None:
            patiently(self.name, self.system.pipe_file, self.key, bytes(content))
            return
        self.file.write(bytes(content))
        self.file.close()
        patiently(self.name, self.system.cp_file, self.temporary, self.key)
        patiently(self.name, self.system.rm_file, self.temporary)

    def drop(self) -> None:
        if self.file is not None:
            with suppress(Exception):  # what stays is a hidden file that nobody reads
                self.file.close()
            with suppress(OSError):
                patiently_for(DISCARD_S, self.name, self.system.rm_file, self.temporary)
