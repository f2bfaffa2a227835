"""Paths on a store that fsspec reaches, such as s3://bucket/key, with the methods of pathlib.Path.

`place` makes them. What works on a Path works on these, with an object store's own semantics: there are no folders but those
of the keys, no links, and no file is changed in place; os and shutil refuse them.
"""

import errno
import glob
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import IO, Annotated, Any, NoReturn

import fsspec
from pydantic import AfterValidator, BeforeValidator

from pipeline.storage.patience import patiently

# fsspec knows others, some of which (reference::, zip::) read what a file tells them to read.
STORES = ("s3", "s3a", "gs", "gcs", "hdfs", "webhdfs", "abfs", "abfss", "az", "adl", "memory")
BLOCK_BYTES = 8 << 20  # of a file that is read or written piece by piece


def place(text: str | Path) -> Path:
    """A path, on a store where `text` is a URL of one.

    Raises:
        ValueError: no storage has such URLs, or it names a password: it would be written down.
    """
    if isinstance(text, Path):
        return text
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme in ("file", "local"):
        return Path(rest)
    if "::" in text or scheme not in STORES:
        raise ValueError(f"{scheme}:// is no storage: give a path, or {', '.join(f'{known}://' for known in STORES)}")
    if re.match(r"[^/@]*:[^/@]*@", rest):
        raise ValueError(
            f"{scheme}://…@{rest.rpartition('@')[2]} has a password in it: leave it to the environment or the store's own "
            "configuration"
        )
    if (rest.startswith("/") and scheme != "memory") or not rest.strip("/"):
        raise ValueError(f"{text} names no {'host' if 'hdfs' in scheme else 'bucket'}: write {scheme}://NAME/folder")
    return StorePath(text)


def _validated(value: Any) -> Any:
    return place(value) if isinstance(value, str) else value


# The type of a setting that names a file or folder, on a mounted file system or a store.
Place = Annotated[Path, BeforeValidator(_validated)]


def checked_place(text: str) -> str:
    """A text that `place` takes. Raises ValueError."""
    place(text)
    return text


# The type of a recorded text that names one: what is read may be untrusted.
PlaceText = Annotated[str, AfterValidator(checked_place)]


class StorePath(PosixPath):
    """A file or folder on a store: a folder is there while a key below it is.

    Every method asks again while the store does not answer (see patience), and raises OSError as pathlib does.
    """

    @property
    def scheme(self) -> str:
        """Of the URL."""
        return self.parts[0].rstrip(":")

    @property
    def system(self) -> fsspec.AbstractFileSystem:
        """fsspec's file system; credentials come from the environment or the store's own configuration."""
        return file_system(self.scheme)

    @property
    def key(self) -> str:
        """The path as the file system takes it."""
        return self.system._strip_protocol(str(self))

    def __str__(self) -> str:
        return f"{self.scheme}://{'/'.join(self.parts[1:])}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} is on a store, and this needs a file of this machine")

    def __rtruediv__(self, key: Any) -> "StorePath":
        """What is absolute stays as it is below another folder."""
        return self

    def as_posix(self) -> str:
        return str(self)

    def as_uri(self) -> str:
        return str(self)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> "StorePath":
        return self

    def resolve(self, strict: bool = False) -> "StorePath":
        return self

    def _found(self) -> dict[str, Any] | None:
        try:
            return patiently(self, self.system.info, self.key)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        info = self._found()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        mode = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        when = next((info[key] for key in ("LastModified", "last_modified", "mtime", "created") if info.get(key)), 0)
        seconds = (
            when.timestamp() if hasattr(when, "timestamp") else float(when) if isinstance(when, int | float) else 0.0
        )
        return os.stat_result((mode, 0, 0, 1, 0, 0, info.get("size") or 0, seconds, seconds, seconds))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._found() is not None

    def is_file(self) -> bool:
        return (info := self._found()) is not None and info["type"] == "file"

    def is_dir(self) -> bool:
        return (info := self._found()) is not None and info["type"] == "directory"

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator["StorePath"]:  # type: ignore[override]
        for entry in patiently(self, self.system.ls, self.key, detail=False):
            name = entry.rstrip("/").rpartition("/")[2]
            if name and self.system._strip_protocol(entry).rstrip("/") != self.key.rstrip("/"):
                yield self / name

    def glob(self, pattern: str) -> Iterator["StorePath"]:  # type: ignore[override]
        root = self.key.rstrip("/")
        for entry in patiently(self, self.system.glob, f"{glob.escape(root)}/{pattern}"):
            name = self.system._strip_protocol(entry).removeprefix(root).strip("/")
            if name:
                yield self / name

    def rglob(self, pattern: str) -> Iterator["StorePath"]:  # type: ignore[override]
        return self.glob(f"**/{pattern}")

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Opens it; what is written appears when the file is closed. Files that are written are better left to `uploading`."""
        if "a" in mode or "+" in mode:
            raise OSError(errno.ENOTSUP, "a file on a store cannot be changed in place", str(self))
        if "x" in mode and self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        plain = "rb" if "r" in mode else "wb"
        file = patiently(self, self.system.open, self.key, plain, block_size=BLOCK_BYTES)
        return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)

    def read_bytes(self) -> bytes:
        return patiently(self, self.system.cat_file, self.key)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        patiently(self, self.system.pipe_file, self.key, bytes(data))
        return len(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a store has no empty folders. Raises FileExistsError as pathlib does."""
        info = self._found()
        if info and (info["type"] == "file" or not exist_ok):
            raise FileExistsError(errno.EEXIST, "File exists", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        with suppress(FileNotFoundError):
            patiently(self, self.system.rm_file, self.key)

    def rmdir(self) -> None:
        """Does nothing: a folder is gone with its last file."""

    def rename(self, target: Any) -> "StorePath":
        """Copies within the store, then deletes: not atomic. A commit is the manifest's, see Storage.commit."""
        target = place(target) if isinstance(target, str) else target
        copy(self, target)
        remove_tree(self)
        return target

    replace = rename


def file_system(scheme: str) -> fsspec.AbstractFileSystem:
    """The file system of a store. Raises OSError where its package is missing."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 30}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise OSError(errno.ENOPKG, f"{scheme}:// needs a package: {error}", scheme) from None


def on_store(path: Path) -> bool:
    """Whether a path lies on a store, not on a mounted file system."""
    return isinstance(path, StorePath)


def copy(source: StorePath, target: StorePath) -> None:
    """Copies a file, or all files of a folder, within a store."""
    files = [source] if source.is_file() else files_below(source)
    for file in files:
        name = str(file).removeprefix(str(source)).strip("/")
        patiently(source, source.system.cp_file, file.key, (target / name if name else target).key)


def files_below(folder: StorePath) -> list[StorePath]:
    """All files of a folder and of those in it, sorted by name."""
    root = folder.key.rstrip("/")
    found = patiently(folder, folder.system.find, root)
    return [folder / name.removeprefix(root).strip("/") for name in sorted(map(folder.system._strip_protocol, found))]


def remove_tree(path: StorePath) -> None:
    """Deletes a file, or a folder with all that is in it, if it is there."""
    with suppress(FileNotFoundError):
        patiently(path, path.system.rm, path.key, recursive=True)
