"""Files of an untrusted folder: regular ones below it; links, pipes and devices are refused."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, cast

from pydantic import AfterValidator

from features.errors import UserError
from features.printable import has_controls, printable

NO_LINK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # neither another file by a link, nor a wait at a pipe
COPIED_BYTES = 8 << 20  # of a file on a store at a time
MAX_PATH_BYTES, MAX_NAME_BYTES = 1024, 255  # of a relative path, and of a name in it

_KINDS = {
    "a link": stat.S_ISLNK, "a pipe": stat.S_ISFIFO, "a folder": stat.S_ISDIR, "a socket": stat.S_ISSOCK,
    "a file": stat.S_ISREG,
}  # fmt: skip


def _plain(name: str) -> str:
    """Raises ValueError unless a name stays below the folder it is relative to."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or {"..", "."} & {*parts} or parts[0][0] == "/" or has_controls(name):
        raise ValueError(f"{printable(name[:100])!r} is not a plain relative path")
    if len(name.encode()) > MAX_PATH_BYTES or max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
        raise ValueError(f"{printable(name[:100])!r}… is longer than a path may be")
    return name


# A file that a manifest names, relative to the manifest's folder: no "..", no "." and no root.
RelativePath = Annotated[str, AfterValidator(_plain)]


def mounted(path: Path) -> bool:
    """Whether a path is one of a mounted file system. Another class of paths, of a store, opens itself: it has no links."""
    return type(path) is type(Path())


def lstat_regular(folder: Path, name: str) -> os.stat_result | None:
    """The status of the file `name` below `folder`, None where it is missing.

    The folder itself may be a link: whoever names it trusts it. Nothing below it may be one.

    Args:
        name: a RelativePath.
    Raises:
        UserError: it, or a folder on the way, is a link, or it is no regular file: reading a pipe or a device might never end.
    """
    if not mounted(folder):
        return _status_of_key(folder / name)
    path, parts = folder, PurePosixPath(name).parts
    for number, part in enumerate(parts, 1):
        path = path / part
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        wanted = stat.S_ISREG if number == len(parts) else stat.S_ISDIR
        if not wanted(status.st_mode):
            raise irregular(path, status.st_mode, "file" if number == len(parts) else "folder")
    return status


def _status_of_key(path: Path) -> os.stat_result | None:
    """The status of a file on a store, None where it is missing. Raises UserError for a folder."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise irregular(path, status.st_mode)
    return status


@contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """A path of the file's content on this machine: itself, or of one on a store a copy without a name, gone at the end.

    Errors of the block name the file, not the copy.

    Raises:
        UserError, OSError: as open_regular.
    """
    if mounted(path):
        yield path
        return
    with tempfile.TemporaryFile() as copy:
        with open_regular(path) as content:
            shutil.copyfileobj(content, copy, COPIED_BYTES)
        with path_of_copy(copy, path) as local:
            yield local


@contextmanager
def path_of_copy(copy: BinaryIO, path: Path) -> Iterator[Path]:
    """A path on this machine of an open file without a name, a copy of `path`; errors of the block name that."""
    copy.flush()
    local = Path(f"/dev/fd/{copy.fileno()}")
    try:
        yield local
    except UserError as error:
        raise UserError(str(error).replace(str(local), str(path))) from None


def read_regular(folder: Path, name: str, limit: int) -> bytes:
    """The content of the file `name` below `folder`.

    Args:
        limit: bytes that it may have.
    Raises:
        FileNotFoundError: it is missing.
        UserError: as lstat_regular, or it is larger than `limit`.
    """
    status = lstat_regular(folder, name)
    path = folder / name
    if status is None:
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if status.st_size > limit:
        raise UserError(f"{path} has {status.st_size:,} bytes, more than the {limit:,} that such a file may have")
    if not mounted(path):
        return path.read_bytes()
    with open_regular(path) as file:
        return file.read(status.st_size)


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: str = "rb") -> BinaryIO:
    """A regular file, opened without waiting at a pipe. Folders on the way may be links.

    Args:
        flags: of open(2). mode: of the file object, that goes with them.
    Raises:
        UserError: it is a link, a pipe or whatever else is no regular file.
        OSError: it is missing, or cannot be opened.
    """
    if not mounted(path):
        return cast(BinaryIO, path.open(mode))
    with user_error_for_links(path):
        descriptor = os.open(path, flags | NO_LINK, 0o666)
    if not stat.S_ISREG(kind := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise irregular(path, kind)
    return cast(BinaryIO, os.fdopen(descriptor, mode))


@contextmanager
def user_error_for_links(path: Path) -> Iterator[None]:
    """Turns the OSError of a link that is not followed, or of what is no file, into a UserError."""
    kinds = {errno.ELOOP: stat.S_IFLNK, errno.ENXIO: stat.S_IFSOCK, errno.EISDIR: stat.S_IFDIR}
    try:
        yield
    except OSError as error:
        if error.errno not in kinds:
            raise
        raise irregular(path, kinds[error.errno]) from None


def refuse_link(folder: Path) -> Path:
    """The path of a folder of ours. Raises UserError for a link, also for one that leads nowhere."""
    if folder.is_symlink():
        raise irregular(folder, stat.S_IFLNK, "folder")
    return folder


def irregular(path: Path, mode: int, wanted: Literal["file", "folder"] = "file") -> UserError:
    """The error of a path that is not what is wanted there.

    Args:
        mode: what it is, as st_mode has it.
    """
    if stat.S_ISLNK(mode):
        return UserError(f"{path} is a link, which is not followed. Replace it by the {wanted} itself.")
    kind = next((kind for kind, holds in _KINDS.items() if holds(mode)), "a device")
    return UserError(f"{path} is not a {'regular file' if wanted == 'file' else wanted} but {kind}. Move it away.")
