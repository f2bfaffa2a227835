"""Deltas: what changed between the packages of two steps of a run, applied to the first one."""

# Shapes: N rows of a file that changed, W bytes of a row.

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from features.errors import UserError
from features.regular_files import lstat_regular, mounted, open_regular
from pipeline.serving.layout import file_layouts
from pipeline.serving.manifest import HINT, Manifest, check_files, read_manifest, write_manifest
from pipeline.serving.mapped import mapped
from pipeline.serving.row_formats import row_bytes
from pipeline.storage.files import make_folder, storage_of
from pipeline.storage.local import fsync
from pipeline.storage.staging import staging_of

# What the package of a delta has in common with its base.
SAME = ("format", "tables", "lookups", "sets", "dense_width", "tasks")


def rows_name(file: str) -> str:
    """Where a delta says which rows of a file of tables it has."""
    return f"{file}.rows"


def check_base(base: Manifest, folder: Path, delta: Manifest) -> None:
    """Raises UserError unless a delta, in a folder, is one of a package. base: of a package of a delta, `Manifest.whole`."""
    if delta.base is None:
        raise UserError(f"{folder} is a whole package, no delta of another one")
    if delta.base.package != base.checksum:
        raise UserError(
            f"{folder} changes the package of step {delta.base.step} with checksum {delta.base.package[:16]}, this one is of "
            f"step {base.model.step} with {base.checksum[:16]}. Apply it to the one that it was exported against."
        )
    if other := [name for name in SAME if getattr(delta, name) != getattr(base, name)]:
        raise UserError(f"{folder}: its {other[0]} are not those of the package that it changes. {HINT}")


def bases_of(folder: Path, manifests: Mapping[Path, Manifest], makes: Mapping[Path, str]) -> tuple[Path, ...] | None:
    """What a delta among packages changes, and what that one does, the whole package first; none for a whole package.

    Args:
        makes: of each folder the checksum of its package, of a delta that of the package it makes.
    Returns: None where one of them is not there.
    """
    made: dict[str, Path] = {}
    for place in sorted(manifests, key=lambda place: manifests[place].base is not None):  # whole packages come first
        made.setdefault(makes[place], place)
    bases: list[Path] = []
    while base := manifests[folder].base:
        if (before := made.get(base.package)) is None or before in bases:
            return None
        folder = before
        bases.insert(0, folder)
    return tuple(bases)


def changed_rows(folder: Path, delta: Manifest, file: str, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a file of tables the rows that a delta changes, row_N, ascending, and their bytes, byte_NW.

    Args:
        delta: has `rows_name(file)` among its files. rows: of the whole file. width: W.
    Raises:
        UserError: files that are missing, cut or of another size, or rows that the file does not have.
    """
    name = rows_name(file)
    count = delta.files[name].bytes // 8
    row_N = mapped(folder, delta, name, 8 * count).view(np.int64)
    byte_NW = mapped(folder, delta, file, count * width).reshape(count, width)
    if count and (row_N[0] < 0 or row_N[-1] >= rows or not (row_N[1:] > row_N[:-1]).all()):
        raise UserError(f"{folder / name}: rows that do not ascend, or beyond the {rows:,} of the whole file. {HINT}")
    return row_N, byte_NW


def apply_delta(base: Path, delta: Path, out: Path) -> Manifest:
    """Writes the package that a delta makes of its base: the same bytes in every file as if it had been exported whole.

    Args:
        base: a whole package. out: a new folder of this machine, which is there with all its files or not at all.
    Returns: its manifest.
    Raises:
        UserError: a delta of another package, a damaged one, or a result whose checksums are not those of the delta.
    """
    if not mounted(out):
        raise UserError(f"{out}: a delta is applied on a mounted file system. Choose another folder.")
    old, new = read_manifest(base), read_manifest(delta)
    check_base(old, delta, new)
    check_files(delta, new)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already. Choose another folder, or remove it.")
    whole, tables = new.whole(), file_layouts(base, old)
    with staging_of(out) as staging:
        for name in whole.files:
            make_folder((staging / name).parent)
            if name in tables and rows_name(name) in new.files:
                _copy(base, old, name, staging / name)
                rows, width = tables[name].rows, row_bytes(old.format, tables[name].dim)
                _write_rows(staging / name, rows, width, *changed_rows(delta, new, name, rows, width))
            else:
                _copy(*((delta, new) if name in new.files else (base, old)), name, staging / name)
        written = write_manifest(staging, whole, list(whole.files))
        if wrong := [name for name, file in whole.files.items() if written.files[name] != file]:
            raise UserError(f"{base}: with {delta} its {wrong[0]} is another than was exported: it changed. {HINT}")
        for folder in {(staging / name).parent for name in whole.files}:
            fsync(folder)
        storage_of(out).commit(staging, out)
    return whole


def _write_rows(file: Path, rows: int, width: int, row_N: np.ndarray, byte_NW: np.ndarray) -> None:
    byte_RW = np.memmap(file, np.uint8, "r+", shape=(rows, width))
    byte_RW[row_N] = byte_NW
    byte_RW.flush()


def _copy(folder: Path, manifest: Manifest, name: str, out: Path) -> None:
    if name not in manifest.files or lstat_regular(folder, name) is None:
        raise UserError(f"{folder / name} is missing. {HINT}")
    with open_regular(folder / name) as source, out.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
