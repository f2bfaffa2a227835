"""Files of a folder that somebody handed over: regular ones below it, never what a link, a pipe or a device leads to."""

import os
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from features.errors import UserError
from features.printable import has_controls, printable

MAX_TEXT_BYTES = 256 << 20  # of a manifest, schema or encoders.json, unless said otherwise


def _plain(name: str) -> str:
    """Raises ValueError unless a name stays below the folder it is relative to."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or {"..", "."} & {*parts} or parts[0][0] == "/" or has_controls(name):
        raise ValueError(f"{printable(name)!r} is not a plain relative path")
    return name


# A file that a manifest names, relative to the manifest's folder: no "..", no "." and no root.
RelativePath = Annotated[str, AfterValidator(_plain)]


def status_of(folder: Path, name: str) -> os.stat_result | None:
    """The status of the file `name` below `folder`, None where it is missing.

    The folder itself may be a link: whoever names it trusts it. Nothing below it may be one.

    Args:
        name: a RelativePath.
    Raises:
        UserError: it, or a folder on the way, is a link, or it is no regular file: reading a pipe or a device might never end.
    """
    path, parts = folder, PurePosixPath(name).parts
    for number, part in enumerate(parts, 1):
        path = path / part
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        wanted = stat.S_ISREG if number == len(parts) else stat.S_ISDIR
        if not wanted(status.st_mode):
            kind = "file" if number == len(parts) else "folder"
            raise UserError(
                f"{path} is not a regular {kind} but {_kind(status.st_mode)}. Replace it by what it stands for."
            )
    return status


def read_regular(folder: Path, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The content of the file `name` below `folder`.

    Args:
        limit: bytes that it may have.
    Raises:
        FileNotFoundError: it is missing.
        UserError: as status_of, or it is larger than `limit`.
    """
    status = status_of(folder, name)
    path = folder / name
    if status is None:
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if status.st_size > limit:
        raise UserError(f"{path} has {status.st_size:,} bytes, more than the {limit:,} that such a file may have")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return file.read(status.st_size)


def _kind(mode: int) -> str:
    kinds = {"a link": stat.S_ISLNK, "a pipe": stat.S_ISFIFO, "a folder": stat.S_ISDIR, "a socket": stat.S_ISSOCK}
    return next(
        (kind for kind, holds in kinds.items() if holds(mode)), "a device" if not stat.S_ISREG(mode) else "a file"
    )
