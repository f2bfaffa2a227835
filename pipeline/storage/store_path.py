"""Paths on a store that fsspec reaches, such as s3://bucket/key, with the methods of pathlib.Path.

`place` makes them. What works on a Path works on these, with an object store's own semantics: there are no folders but those
of the keys, no links, and no file is changed in place; os and shutil refuse them.
"""

import errno
import fnmatch
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Annotated, Any, NoReturn, TypeVar, cast

import fsspec
from pydantic import AfterValidator, BeforeValidator

from features.printable import has_controls, printable
from pipeline.storage.object_files import READ_BYTES, S3, ObjectReader, ObjectWriter, TextWriter, read_whole
from pipeline.storage.patience import has_secret, missing, patiently
from pipeline.storage.patterns import matches
from pipeline.storage.systems import file_system, s3_delete, s3_info, stripped

# fsspec knows others, some of which (reference::, zip::) read what a file tells them to read.
STORES = ("s3", "s3a", "gs", "gcs", "hdfs", "webhdfs", "abfs", "abfss", "az", "adl", "memory")
T = TypeVar("T")
KEYS_AT_ONCE = 1000  # that S3 deletes by one request
CALLS_AT_ONCE = 8  # of copies and deletions of many files


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
        return Path(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    if "::" in text or scheme not in STORES:
        raise ValueError(f"{scheme}:// is no storage: give a path, or {', '.join(f'{known}://' for known in STORES)}")
    if has_secret(scheme, rest):
        raise ValueError(
            f"{scheme}://… has a password, a key or a signature in it: leave it to the environment or the store's own "
            "configuration"
        )
    if (rest.startswith("/") and scheme != "memory") or not rest.strip("/"):
        raise ValueError(f"{text} names no {'host' if 'hdfs' in scheme else 'bucket'}: write {scheme}://NAME/folder")
    if ".." in rest.split("/") or has_controls(rest):
        raise ValueError(
            f"{printable(text)} has a .. or a control character in it: write the path of the folder itself"
        )
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

    Every method asks again while the store does not answer (see patience), and raises OSError as pathlib does. What differs
    from a mounted file system: `mkdir` makes nothing, a folder is gone with its last file, `rename` copies, a file and a folder
    may have one name, `..` is refused, and what a process does to links, modes and owners raises TypeError.
    """

    @property
    def scheme(self) -> str:
        """Of the URL."""
        return self.parts[0].rstrip(":")

    @property
    def system(self) -> fsspec.AbstractFileSystem:
        """fsspec's file system; credentials come from the environment or the store's own configuration."""
        return file_system(str(self))

    @property
    def key(self) -> str:
        """The path as the file system takes it."""
        return stripped(self.system, str(self))

    def __str__(self) -> str:
        return f"{self.scheme}://{'/'.join(self.parts[1:])}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __fspath__(self) -> NoReturn:
        raise TypeError(f"{self} is on a store, and this needs a file of this machine")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __reduce__(self) -> tuple[type["StorePath"], tuple[str]]:
        return type(self), (str(self),)

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

    def expanduser(self) -> "StorePath":
        return self

    def joinpath(self, *names: str | os.PathLike[str]) -> "StorePath":
        """Raises ValueError for a name that leads out of the folder."""
        if isinstance(names[-1] if names else None, StorePath):
            return cast(StorePath, names[-1])
        added = [name for each in names for name in PurePosixPath(each).parts]
        if "/" in added or ".." in added:
            raise ValueError(f"{'/'.join(added)} does not lie below {self}")
        return type(self)("/".join((str(self).rstrip("/"), *added)))

    def __truediv__(self, name: str | os.PathLike[str]) -> "StorePath":
        return self.joinpath(name)

    def __rtruediv__(self, other: object) -> "StorePath":
        return self  # as of an absolute path; Python asks the subclass first

    def match(self, path_pattern: Any, **named: Any) -> bool:
        return PurePosixPath(*self.parts[1:]).match(str(path_pattern), **named)

    @property
    def parent(self) -> "StorePath":
        return type(self)(*self.parts[: max(2, len(self.parts) - 1)])

    @property
    def parents(self) -> tuple["StorePath", ...]:
        return tuple(type(self)(*self.parts[:count]) for count in range(len(self.parts) - 1, 1, -1))

    def relative_to(self, *other: Any, **_: Any) -> Path:  # type: ignore[override]
        """A relative path, of no store."""
        above = type(self)(*other).parts
        if self.parts[: len(above)] != above:
            raise ValueError(f"{self} is not below {type(self)(*other)}")
        return Path(*self.parts[len(above) :])

    def is_relative_to(self, *other: Any) -> bool:
        return isinstance(other[0], StorePath | str) and self.parts[: len(above := type(self)(*other).parts)] == above

    def samefile(self, other_path: Any) -> bool:
        return self == other_path

    def describe(self) -> dict[str, Any] | None:
        """fsspec's description of a file or folder (type, size, and what the store adds), None where there is none."""
        system, key = self.system, self.key
        bucket, _, name = key.partition("/")
        if self.scheme in S3 and name:
            return patiently(self, s3_info, system, bucket, name)
        try:
            return patiently(self, system.info, key)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        info = self.describe()
        if info is None:
            raise missing(self)
        mode = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        when = next((info[key] for key in ("LastModified", "last_modified", "mtime", "created") if info.get(key)), 0)
        seconds = (
            when.timestamp() if hasattr(when, "timestamp") else float(when) if isinstance(when, int | float) else 0.0
        )
        return os.stat_result((mode, 0, 0, 1, 0, 0, info.get("size") or 0, seconds, seconds, seconds))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.describe() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return (info := self.describe()) is not None and info["type"] == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return (info := self.describe()) is not None and info["type"] == "directory"

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator["StorePath"]:  # type: ignore[override]
        return iter([entry for entry, _ in self.entries()])

    def entries(self) -> list[tuple["StorePath", bool]]:
        """What is in a folder, sorted by name, and whether it is a folder. Raises FileNotFoundError, NotADirectoryError."""
        system, key = self.system, self.key.rstrip("/")
        found: dict[str, bool] = {}
        for entry in patiently(self, system.ls, key, detail=True):
            path = stripped(system, entry["name"]).rstrip("/")
            if path == key and entry["type"] == "file" and not entry["name"].endswith("/"):
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(self))
            if path != key:
                name = path.rpartition("/")[2]
                found[name] = found.get(name, False) or entry["type"] == "directory"
        return [(self / name, found[name]) for name in sorted(found)]

    def glob(self, pattern: str, **_: Any) -> Iterator["StorePath"]:  # type: ignore[override]
        return iter(_selected(self, PurePosixPath(pattern).parts))

    def rglob(self, pattern: str, **_: Any) -> Iterator["StorePath"]:  # type: ignore[override]
        return self.glob(f"**/{pattern}")

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Opens it. What is written appears when the file is closed, and not when a `with` block of it raises."""
        if "a" in mode or "+" in mode:
            raise OSError(errno.ENOTSUP, "a file on a store cannot be changed in place", str(self))
        if "r" in mode:
            info = self.describe()
            if info is None:
                raise missing(self)
            if info["type"] == "directory":
                raise IsADirectoryError(errno.EISDIR, "Is a directory", str(self))
            version = info.get("ETag") if self.scheme in S3 else None
            reader = ObjectReader(str(self), self.system, self.key, info.get("size") or 0, version)
            file = io.BufferedReader(reader, READ_BYTES)
            return file if "b" in mode else io.TextIOWrapper(file, encoding or "utf-8", errors, newline)
        if "x" in mode and self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        writer = ObjectWriter(str(self), self.system, self.scheme, self.key, commits=True)
        return cast(IO[Any], writer if "b" in mode else TextWriter(writer, encoding or "utf-8", errors, newline))

    def read_bytes(self) -> bytes:
        if self.scheme in S3:
            return patiently(self, read_whole, self.system, self.key)[0]
        return patiently(self, self.system.cat_file, self.key)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        text = self.read_bytes().decode(encoding or "utf-8", errors or "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n") if newline is None else text

    def write_bytes(self, data: Any) -> int:
        content = bytes(data)
        patiently(self, self.system.pipe_file, self.key, content)
        return len(content)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))
        return len(data)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Makes an empty file, or renews the time of one; that of a file with content stays."""
        info = self.describe()
        if info and not exist_ok:
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        if info is None or (info["type"] == "file" and not info["size"]):
            self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a store has no empty folders. Raises FileExistsError as pathlib does."""
        info = self.describe()
        if info and (info["type"] == "file" or not exist_ok):
            raise FileExistsError(errno.EEXIST, "File exists", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise missing(self)
        with suppress(FileNotFoundError):
            patiently(self, self.system.rm_file, self.key)

    def rmdir(self) -> None:
        """Does nothing: a folder is gone with its last file. Raises OSError where there is one."""
        if info := self.describe():
            number = errno.ENOTEMPTY if info["type"] == "directory" else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(self))

    def rename(self, target: Any) -> "StorePath":
        """Copies within the store, then deletes: not atomic. A commit is the manifest's, see Storage.commit."""
        target = place(target) if isinstance(target, str) else target
        if not isinstance(target, StorePath) or target.system != self.system:
            raise OSError(errno.EXDEV, "a file cannot be moved to another store", str(self))
        if target != self:
            copy(self, target)
            remove_tree(self)
        return target

    replace = rename


def _selected(folder: StorePath, parts: tuple[str, ...]) -> list[StorePath]:
    """Paths below a folder that match a glob pattern, sorted."""
    if not parts:
        return [folder]
    first, rest = parts[0], parts[1:]
    if first == "**":
        return sorted(folder.joinpath(*names) for names, is_dir in _tree(folder) if matches(names, parts, is_dir))
    if not re.search(r"[*?\[]", first):
        below = folder / first
        return _selected(below, rest) if rest else [below] if below.exists() else []
    try:
        entries = folder.entries()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(path, is_dir) for path, is_dir in entries if fnmatch.fnmatchcase(path.name, first)]
    return [each for path, is_dir in found if is_dir or not rest for each in _selected(path, rest)]


def _tree(folder: StorePath) -> set[tuple[tuple[str, ...], bool]]:
    """Names of all files and folders below a folder and of itself, relative to it, and whether each is a folder."""
    files = [file.parts[len(folder.parts) :] for file in files_below(folder)]
    return {(names, False) for names in files} | {
        (names[:count], True) for names in files for count in range(len(names))
    }


def on_store(path: Path) -> bool:
    """Whether a path lies on a store, not on a mounted file system."""
    return isinstance(path, StorePath)


def copy(source: StorePath, target: StorePath) -> None:
    """Copies a file, or all files of a folder, within a store. Raises FileNotFoundError."""
    files = [source] if source.is_file() else files_below(source)
    if not files:
        raise missing(source)
    copy_all([(file, target.joinpath(*file.parts[len(source.parts) :])) for file in files])


def copy_all(pairs: Sequence[tuple[StorePath, StorePath]], before_each: Callable[[], None] = lambda: None) -> None:
    """Copies files within a store; S3 copies one of more than 5 GB in parts. Raises OSError, and what `before_each` does."""

    def copy_one(pair: tuple[StorePath, StorePath]) -> None:
        before_each()
        patiently(pair[0], pair[0].system.cp_file, pair[0].key, pair[1].key)

    _at_once(copy_one, pairs)


def remove_all(files: Sequence[StorePath]) -> None:
    """Deletes files of one bucket, those that are there: S3 takes many by one request. Raises OSError."""
    if files and files[0].scheme in S3:
        _delete(files[0], [file.key for file in files])
    else:
        _at_once(lambda file: file.unlink(missing_ok=True), files)


def _delete(path: StorePath, keys: list[str]) -> None:
    parts = [keys[start : start + KEYS_AT_ONCE] for start in range(0, len(keys), KEYS_AT_ONCE)]
    _at_once(lambda part: patiently(path, s3_delete, path.system, part), parts)


def _at_once(call: Callable[[T], None], items: Sequence[T]) -> None:
    """Calls for all items, CALLS_AT_ONCE at a time; after an error no more are begun."""
    with ThreadPoolExecutor(CALLS_AT_ONCE, "store") as pool:
        try:
            for done in [pool.submit(call, item) for item in items]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def described_below(folder: StorePath) -> dict[StorePath, dict[str, Any]]:
    """All files of a folder and of those in it, sorted by name, and fsspec's descriptions of them: one listing.

    Returns: none where there is no folder.
    """
    system, root = folder.system, folder.key.rstrip("/")
    try:
        found = patiently(folder, system.find, root, detail=True)
    except FileNotFoundError:
        return {}
    below = {stripped(system, name): info for name, info in found.items() if not name.endswith("/")}
    return {folder / name[len(root) + 1 :]: below[name] for name in sorted(below) if name.startswith(f"{root}/")}


def files_below(folder: StorePath) -> list[StorePath]:
    """All files of a folder and of those in it, sorted by name; none where there is no folder."""
    return [*described_below(folder)]


def remove_tree(path: StorePath) -> None:
    """Deletes a file, or a folder with all that is in it, if it is there. Raises OSError."""
    system, key = path.system, path.key.rstrip("/")
    with suppress(FileNotFoundError):
        if path.scheme in S3:
            # s3fs's own rm takes the name for a pattern.
            _delete(path, [key, *patiently(path, system.find, key)])
        elif re.search(r"[*?\[]", key):  # as others' do
            remove_all([path, *files_below(path)])
        else:
            patiently(path, system.rm, key, recursive=True)
