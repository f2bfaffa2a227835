"""Raw files on any file system: found by pattern, opened, and checked for changes; the units in which workers read them."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from features.errors import UserError, one_line
from pipeline.storage import store_path
from pipeline.storage.patience import patiently
from pipeline.storage.systems import stripped

BLOCK_BYTES = 32 << 20  # of raw text or columns that are in memory and parsed at a time
READ_AHEAD = 4 << 20  # of remote files that are read in small steps
VERSIONS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "updated", "created")
BOM = b"\xef\xbb\xbf"
STORES = ("file", "local", *store_path.STORES)
UNPACK_RATIO = (
    500  # logs reach some tens, lines that hardly differ 200; gzip ends at 1,032, zstd and bzip2 beyond 10,000
)
ALWAYS_ALLOWED_BYTES = 256 << 20  # bytes that any file may unpack to


@dataclass(frozen=True)
class RawFile:
    """A raw file.

    Attributes:
        path: as fsspec takes it; of a local file the absolute path.
        size: bytes.
        version: changes when the file is written again.
        max_unpack_ratio: it may unpack to so many times its size, or to ALWAYS_ALLOWED_BYTES.
    """

    path: str
    size: int
    version: str
    max_unpack_ratio: int = field(default=UNPACK_RATIO, compare=False)

    @property
    def max_unpacked(self) -> int:
        """Bytes to which it may unpack."""
        return max(ALWAYS_ALLOWED_BYTES, self.size * self.max_unpack_ratio)

    def check_unpacked(self, size: int, where: str = "") -> None:
        """Raises UserError where `size` bytes are more than the file may unpack to; `where` names the part of it."""
        limit = self.max_unpacked
        if size > limit:
            raise UserError(
                f"{self.path}{where}: {self.size:,} bytes unpack to {size:,} or more, and {limit:,} are allowed: the larger of "
                f"max_unpack_ratio={self.max_unpack_ratio} times its size and {ALWAYS_ALLOWED_BYTES:,}. Raise "
                "max_unpack_ratio if the file is what it should be."
            )


@dataclass(frozen=True)
class Unit:
    """What a worker reads at a time: a file or a part of one.

    Attributes:
        number: index of the file among those of its stream.
        start, stop: what the format counts, such as bytes or row groups, 0 at a file's first unit; stop None: to the end.
        first_row: plus the index of a row in the unit, a number that is unique in the file.
    """

    file: RawFile
    number: int
    start: int = 0
    stop: int | None = None
    first_row: int = 0


def find(
    folder: str,
    pattern: str,
    dates: Sequence[date] | None = None,
    max_unpack_ratio: int = UNPACK_RATIO,
    key: str = "source.files",
) -> list[RawFile]:
    """Files below `folder` (a path, or a URL such as s3://bucket/logs) that match, in name order.

    Args:
        pattern: glob; {date} in it stands for any day, or for each of `dates` (at least one), by which
            files are then ordered first.
        max_unpack_ratio: of the files.
        key: where the pattern was given, for messages.

    Raises:
        UserError: no file matches, the pattern is not a glob pattern, or the storage reports an error.
    """
    if dates is None:
        found = matching(folder, pattern.replace("{date}", "*"), key)
    else:
        by_date = files_by_date(folder, pattern, dates, key)
        found = list(dict.fromkeys(file for files in by_date.values() for file in files))
    if not found:
        of = f" of {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}" if dates else ""
        raise UserError(f"{folder.rstrip('/')}/{pattern}: no such file{of}. Set input=FOLDER, or {key}.")
    return [replace(file, max_unpack_ratio=max_unpack_ratio) for file in found]


def files_by_date(
    folder: str, pattern: str, dates: Sequence[date], key: str = "source.files"
) -> dict[date, list[RawFile]]:
    """Files as `find` finds them, by the date in place of {date}; empty lists for days without files.

    Raises:
        UserError: the pattern is not a glob pattern, or the storage reports an error.
    """
    return {day: matching(folder, pattern.replace("{date}", day.isoformat()), key) for day in dates}


def matching(folder: str, pattern: str, key: str = "source.files") -> list[RawFile]:
    """Files that match a plain glob, in name order; none where nothing does.

    Links in the folder are followed, to files and to folders: whoever put them there chose what is read.

    Raises:
        UserError: the pattern is not a glob pattern, or the storage reports an error.
    """
    if Path(pattern).is_absolute() or "://" in pattern or ".." in pattern.split("/"):
        raise UserError(f"{pattern}: {key} is a pattern below the input folder. Set input=FOLDER to its folder.")
    system, root = file_system(folder)
    if isinstance(system, LocalFileSystem):  # fsspec's own glob does not follow links to folders
        try:
            found = [_local(path) for path in Path(root).glob(pattern) if path.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{pattern}: not a glob pattern: {one_line(error)}. Fix {key}.") from None
    else:
        found = _stored(system, folder, f"{_literal(root.rstrip('/'))}/{pattern}")
    return sorted(set(found), key=lambda file: file.path)


def _stored(system: fsspec.AbstractFileSystem, folder: str, pattern: str) -> list[RawFile]:
    with _reachable(folder):
        system.invalidate_cache()
        try:
            found = patiently(folder, system.glob, pattern, detail=True)
        except FileNotFoundError:
            return []
    files = [info for info in found.values() if info["type"] == "file"]
    return [RawFile(system.unstrip_protocol(info["name"]), info["size"], _version(info)) for info in files]


def _literal(path: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def _local(path: Path) -> RawFile:
    status = path.stat()
    return RawFile(str(path), status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _version(info: dict[str, Any]) -> str:
    version = next((info[key] for key in VERSIONS if info.get(key) is not None), info["size"])
    # A storage may give the same time as a datetime in a listing and as text for a single file.
    return str(version.timestamp() if isinstance(version, datetime) else version)


def file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL and the path on it. Raises UserError for one that is not installed or known."""
    scheme = path.partition("://")[0] if "://" in path else ""
    if "::" in path or path.startswith("data:") or (scheme and scheme not in STORES):
        raise UserError(
            f"{path}: raw files are read from paths and from {', '.join(f'{s}://' for s in STORES if s != 'local')}. Set input."
        )
    try:
        if scheme in store_path.STORES:
            system = store_path.place(path).system  # type: ignore[attr-defined]
            return system, stripped(system, path)
        return url_to_fs(path)
    except ValueError as error:  # such as a password in it
        raise UserError(f"{one_line(error)}. Set input.") from None
    except ImportError as error:
        raise UserError(f"{path}: {scheme}:// needs a package. {one_line(error)}: install it with pip.") from None
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(f"{path}: cannot be opened: {one_line(error)}. Set input to a folder or URL.") from None


def is_local(path: str) -> bool:
    """Whether a file is on this machine's own or a mounted file system."""
    return isinstance(file_system(path)[0], LocalFileSystem)


@contextmanager
def _reachable(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each storage has exceptions of its own
        if silent := no_answer(error):
            raise silent from None
        said = Exception(error.strerror) if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{path}: the storage reports an error: {one_line(said)}. Check address and credentials."
        ) from None


def no_answer(error: Exception) -> UserError | None:
    """The line for a store that has not answered for too long; None for another error."""
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
        return UserError(f"{error.filename}: {error.strerror}. Run again once it does.")
    return None


@contextmanager
def readable(path: str, to_its_end: bool = False) -> Iterator[None]:
    """Turns whatever reading a file raises into a UserError: each storage and format has exceptions of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if silent := no_answer(error):
            raise silent from None
        how, cure = (" to its end", "") if to_its_end else ("", ", or leave it out of the schema's files")
        raise UserError(f"{path}: cannot be read{how}: {one_line(error)}. Fetch it again{cure}.") from None


def check_unchanged(file: RawFile) -> None:
    """Raises UserError where a file has changed since `find`."""
    if _current(file.path) != file:
        raise UserError(f"{file.path} changed while it was read. Run again once nobody writes to it.")


def _current(path: str) -> RawFile | None:
    system, name = file_system(path)
    if isinstance(system, LocalFileSystem):
        return _local(Path(path)) if Path(path).exists() else None
    with _reachable(path):
        system.invalidate_cache()
        try:
            info = patiently(path, system.info, name)
        except FileNotFoundError:
            return None
    return RawFile(path, info["size"], _version(info))


def open_raw(path: str, cache: str = "readahead") -> BinaryIO:
    """Opens a file's bytes; with cache "none" every read of a remote file is one request.

    Raises:
        OSError: it cannot be opened, or is no regular file: reading a pipe or a device might never end.
    """
    system, name = file_system(path)
    if isinstance(system, LocalFileSystem) and Path(name).exists() and not Path(name).is_file():
        raise OSError("it is not a regular file")
    if isinstance(system, LocalFileSystem):
        return system.open(name, "rb", cache_type=cache, block_size=READ_AHEAD)
    return cast(BinaryIO, PatientFile(path, lambda: system.open(name, "rb", cache_type=cache, block_size=READ_AHEAD)))


class PatientFile:
    """A file on a store, whose reads ask again while it does not answer."""

    def __init__(self, path: str, opened: Callable[[], BinaryIO]) -> None:
        self.path = path
        self.file = patiently(path, opened)

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        position = self.file.tell()

        def read() -> bytes:
            self.file.seek(position)
            return self.file.read(size)

        return patiently(self.path, read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "PatientFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def codec_of(path: str) -> str | None:
    """The compression of a text file, by its name; None for a plain one."""
    try:
        return pa.Codec.detect(path).name
    except (ValueError, TypeError):  # an unknown ending; a name without one
        return None


@contextmanager
def open_text(file: RawFile, cache: str = "readahead") -> Iterator[tuple[pa.NativeFile, BinaryIO]]:
    """A text file from its beginning, decompressed by its name, and the raw file, whose position is the progress.

    Reading it raises UserError where it unpacks to more than it may.
    """
    with open_raw(file.path, cache) as raw:
        stream, codec = pa.PythonFile(raw, mode="r"), codec_of(file.path)
        unpacked = (
            pa.PythonFile(_Unpacked(pa.CompressedInputStream(stream, codec), file), mode="r") if codec else stream
        )
        yield unpacked, raw


class _Unpacked:
    """A stream that counts what was read of it."""

    closed = False

    def __init__(self, stream: pa.NativeFile, file: RawFile) -> None:
        self.stream, self.file, self.position = stream, file, 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Raises UserError for too many."""
        data = self.stream.read(size)
        self.position += len(data)
        self.file.check_unpacked(self.position)
        return data

    def tell(self) -> int:
        """The number of bytes that were read."""
        return self.position

    def close(self) -> None:
        """Does nothing: the raw file is closed by whoever opened it."""
