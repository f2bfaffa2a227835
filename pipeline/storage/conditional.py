"""Puts that happen only where nothing stands, or what was seen last, whichever writer comes first."""

import errno
import hashlib
import uuid
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from pipeline.storage.object_files import S3, read_whole
from pipeline.storage.patience import patiently, patiently_for, time_limit
from pipeline.storage.store_path import StorePath

WRITER = "writer"  # key of S3's metadata that names a put


class Changed(OSError):  # noqa: N818
    """An object is not the one that was seen last."""


def write_new(path: StorePath, content: bytes) -> None:
    """Writes an object where there is none, by a conditional put where the store has it. Raises FileExistsError."""
    put_new(path, content)


def put_new(path: StorePath, content: bytes) -> str:
    """`write_new`, and the version of what was written.

    A put whose answer was lost is repeated and then meets itself: S3's object names its writer, elsewhere the content decides.

    Raises:
        FileExistsError: something stands there.
    """
    tries, writer = 0, uuid.uuid4().hex
    named = {"Metadata": {WRITER: writer}} if path.scheme in S3 else {}

    def put() -> Any:
        nonlocal tries
        tries += 1
        return path.system.pipe_file(path.key, content, mode="create", **named)

    try:
        answer = patiently(path, put)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ESTALE):
            raise
        ours = _writer_of(path) == writer if named else tries > 1 and content_of(path) == content
        if not ours:
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        answer = None
    if not named:
        return hashlib.sha256(content).hexdigest()
    return str(answer["ETag"]) if answer else version_of(path) or ""


def version_of(path: StorePath) -> str | None:
    """What changes whenever an object does, None where there is none."""
    if path.scheme in S3:
        found = path.describe()
        return str(found["ETag"]) if found and found["type"] == "file" else None
    content = content_of(path)
    return None if content is None else hashlib.sha256(content).hexdigest()


def read_version(path: StorePath) -> tuple[bytes, str] | None:
    """A small object's content and its version, None where there is none."""
    if path.scheme not in S3:
        content = content_of(path)
        return None if content is None else (content, hashlib.sha256(content).hexdigest())

    try:
        return patiently(path, read_whole, path.system, path.key)
    except FileNotFoundError:
        return None


def write_over(path: StorePath, content: bytes, version: str, limit: float | None = None) -> str:
    """Writes an object over the version that was seen last; returns the new one.

    S3 compares and writes in one step; elsewhere another writer may come between, which is seen by reading again.

    Args:
        limit: seconds for which the store may fail to answer, in place of `time_limit`.
    Raises:
        Changed: there is another version, or none. A repeated put that meets itself is none of these.
    """
    limit = time_limit() if limit is None else limit
    if path.scheme not in S3:
        if version_of(path) != version:
            raise Changed(errno.ESTALE, "changed by another writer", str(path))
        patiently_for(limit, path, path.system.pipe_file, path.key, content)
        return hashlib.sha256(content).hexdigest()
    writer = uuid.uuid4().hex
    named: dict[str, Any] = {"IfMatch": version, "Metadata": {WRITER: writer}}
    try:
        return str(patiently_for(limit, path, path.system.pipe_file, path.key, content, **named)["ETag"])
    except OSError as error:
        if error.errno not in (errno.ESTALE, errno.ENOENT):
            raise
        if isinstance(error, FileNotFoundError) or _writer_of(path) != writer:
            raise Changed(errno.ESTALE, "changed by another writer", str(path)) from None
        return version_of(path) or ""


def remove_version(path: StorePath, version: str, limit: float | None = None) -> None:
    """Deletes an object unless it has changed; elsewhere than on S3 a change just before is not seen. Raises OSError.

    Args:
        limit: as of `write_over`.
    """
    limit = time_limit() if limit is None else limit
    with suppress(FileNotFoundError):
        if path.scheme not in S3:
            if version_of(path) == version:
                patiently_for(limit, path, path.system.rm_file, path.key)
            return
        bucket, _, key = path.key.partition("/")
        named = {"Bucket": bucket, "Key": key, "IfMatch": version}
        try:
            patiently_for(limit, path, path.system.call_s3, "delete_object", **named)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise


def age_of(path: StorePath) -> float | None:
    """Seconds since an object was written, by the store's clock alone; None where the store does not say."""
    if path.scheme not in S3:
        return None
    try:
        found = _head(path)
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - found["LastModified"]).total_seconds())
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def content_of(path: StorePath) -> bytes | None:
    """An object's content, None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _writer_of(path: StorePath) -> str | None:
    try:
        return _head(path)["Metadata"].get(WRITER)
    except FileNotFoundError:
        return None


def _head(path: StorePath) -> Any:
    bucket, _, key = path.key.partition("/")
    return patiently(path, path.system.call_s3, "head_object", Bucket=bucket, Key=key)
