"""Packages on a store: fetched once into a folder of this machine, compared with their manifests on the way, then mapped."""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from features.errors import UserError, one_line
from features.regular_files import lstat_regular, mounted
from pipeline.serving.manifest import FILE, HINT, Manifest, StoredFile, read_manifest
from pipeline.storage.files import make_folder, write_json
from pipeline.storage.ranges import ShortFileError, read_ranges
from pipeline.storage.staging import is_staging, remove_left, staging_of
from pipeline.storage.store_path import place

CACHE = "TASKFUSE_PACKAGES"  # environment: the folder; without it taskfuse/packages in XDG_CACHE_HOME or ~/.cache
MOST_PACKAGES = 8  # that are kept, the ones used last
READ_BYTES, READS = 8 << 20, 4  # of a read, and how many at a time
FILES = 4  # at a time


def located(path: Path | str) -> Path:
    """A path, on a store where it is a URL. Raises UserError for a URL of no store."""
    if isinstance(path, Path):
        return path
    if "://" not in path:
        return Path(path)
    try:
        return place(path)
    except ValueError as error:
        raise UserError(str(error)) from None


def fetched(folder: Path) -> Path:
    """`fetched_all` of one."""
    return fetched_all([folder])[0]


def fetched_all(folders: Sequence[Path]) -> list[Path]:
    """Packages as folders of this machine: themselves, or their files as they were fetched from a store now or before.

    What belongs together, such as a package and its deltas, is asked for together: the oldest of more than MOST_PACKAGES are
    deleted afterwards, and none of these.

    Raises:
        UserError: one is missing or damaged, or there is no room for it.
    """
    found = [folder if mounted(folder) else _here(folder) for folder in folders]
    if not all(map(mounted, folders)):
        _forget_all_but(found)
    return found


def _here(folder: Path) -> Path:
    manifest = read_manifest(folder)
    there = cache_folder() / manifest.checksum
    if not _is_whole(there, manifest):
        try:
            _fetch(folder, manifest, there)
        except OSError as error:
            raise UserError(f"{folder}: cannot be fetched to {there.parent}: {one_line(error)}") from None
    with suppress(OSError):
        os.utime(there)
    return there


def cache_folder() -> Path:
    """Where packages of stores are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(cache, "taskfuse", "packages"))


def _is_whole(there: Path, manifest: Manifest) -> bool:
    """Whether a folder has the manifest and its files, by their sizes; checksums are compared where a package is loaded."""
    try:
        if read_manifest(there) != manifest:
            return False
        found = {name: lstat_regular(there, name) for name in manifest.files}
    except (UserError, OSError):
        return False
    return all(status is not None and status.st_size == manifest.files[name].bytes for name, status in found.items())


def _fetch(folder: Path, manifest: Manifest, there: Path) -> None:
    """Fetches all files aside, the manifest last, and moves them into place in one rename. Raises UserError, OSError."""
    size = sum(file.bytes for file in manifest.files.values())
    make_folder(there.parent)
    if not os.access(there.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there.parent))
    for left in there.parent.iterdir():
        if is_staging(left):  # unless a process is at it, it was killed
            remove_left(left.with_name(left.name.partition(".")[0]))
    if (free := shutil.disk_usage(there.parent).free) < size:
        raise UserError(
            f"{folder}: its {size:,} bytes do not fit into the {free:,} that are free in {there.parent}. Make room, or set "
            f"{CACHE} to another folder."
        )
    with staging_of(there) as staging:
        for name in manifest.files:
            make_folder((staging / name).parent)
        with ThreadPoolExecutor(FILES, "fetch") as pool:
            fetching = [pool.submit(_fetch_file, folder, staging, *each) for each in manifest.files.items()]
            try:
                for each in fetching:
                    each.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        write_json(staging / FILE, manifest.model_dump())
        try:
            staging.rename(there)
        except OSError:  # a folder stands there: damaged, or of a process that was faster and is reading it
            if not _is_whole(there, manifest):
                shutil.rmtree(there, ignore_errors=True)
                staging.rename(there)


def _fetch_file(folder: Path, target: Path, name: str, file: StoredFile) -> None:
    """Copies a file of a package piece by piece. Raises UserError where it is not what the manifest has."""
    source, digest, starts = folder / name, hashlib.sha256(), range(0, file.bytes, READ_BYTES)
    with (target / name).open("xb") as opened:
        for first in range(0, len(starts), READS):
            ranges = [(start, min(start + READ_BYTES, file.bytes)) for start in starts[first : first + READS]]
            try:
                pieces = read_ranges(source, ranges)
            except (FileNotFoundError, ShortFileError):
                raise UserError(f"{source} is missing, or is shorter than the manifest has it. {HINT}") from None
            for content in pieces:
                digest.update(content)
                opened.write(content)
    if digest.hexdigest() != file.sha256:
        raise UserError(f"{source}: its checksum is not the manifest's: it changed after it was written. {HINT}")


def _forget_all_but(used: Sequence[Path]) -> None:
    """Deletes the packages that were used least lately; what maps one keeps its files until it ends."""
    with suppress(OSError):
        kept = [path for path in cache_folder().iterdir() if (path / FILE).is_file() and not is_staging(path)]
        kept.sort(key=lambda path: (path in used, path.stat().st_mtime), reverse=True)
        for path in kept[max(MOST_PACKAGES, len(used)) :]:
            shutil.rmtree(path, ignore_errors=True)
