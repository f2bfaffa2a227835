"""Deltas: what changed between the packages of two steps of a run, applied to the first one."""

# Shapes: N rows of a file that changed, W bytes of a row.

from pathlib import Path, PurePosixPath

import numpy as np

from features.errors import UserError
from pipeline.serving.manifest import HINT, Manifest
from pipeline.serving.mapped import mapped

# What the package of a delta has in common with its base.
SAME = ("format", "tables", "lookups", "sets", "dense_width", "tasks")


def rows_name(file: str) -> str:
    """Where a delta says which rows of a file of tables it has."""
    return str(PurePosixPath(file).with_suffix(".rows"))


def check_base(base: Manifest, folder: Path, delta: Manifest) -> None:
    """Raises UserError unless a delta, in a folder, is one of a package."""
    if delta.base is None:
        raise UserError(f"{folder} is a whole package, no delta of another one")
    if delta.base.package != base.checksum:
        raise UserError(
            f"{folder} changes the package of step {delta.base.step} with checksum {delta.base.package[:16]}, this one is of "
            f"step {base.model.step} with {base.checksum[:16]}. Apply it to the one that it was exported against."
        )
    if other := [name for name in SAME if getattr(delta, name) != getattr(base, name)]:
        raise UserError(f"{folder}: its {other[0]} are not those of the package that it changes. {HINT}")


def changed_rows(folder: Path, delta: Manifest, file: str, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a file of tables the rows that a delta changes, row_N, ascending, and their bytes, byte_NW.

    Args:
        rows: of the whole file. width: W.
    Raises:
        UserError: files that are missing, cut or of another size, or rows that the file does not have.
    """
    name = rows_name(file)
    listed = delta.files.get(name)
    if listed is None:
        return np.zeros(0, np.int64), np.zeros((0, width), np.uint8)
    count = listed.bytes // 8
    row_N = mapped(folder, delta, name, 8 * count).view(np.int64)
    byte_NW = mapped(folder, delta, file, count * width).reshape(count, width)
    if count and (row_N[0] < 0 or row_N[-1] >= rows or not (row_N[1:] > row_N[:-1]).all()):
        raise UserError(f"{folder / name}: rows that do not ascend, or beyond the {rows:,} of the whole file. {HINT}")
    return row_N, byte_NW
