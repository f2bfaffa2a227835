"""The folders of a job: one in which the dataset is written, beside its final place, and one for the files between steps."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from features.errors import UserError
from pipeline.ingest.state import RESERVE_FILE
from pipeline.storage import staging
from pipeline.storage.lease import lease
from pipeline.storage.store_path import StorePath, on_store, remove_tree


@contextmanager
def staging_of(out: Path) -> Iterator[Path]:
    """As pipeline.storage.staging.staging_of, with scratch/ in it, the folders of a job. Raises UserError where none can be."""
    with staging.staging_of(out) as folder:
        try:
            make_folders(folder)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Choose another out=.") from None
        yield folder


@contextmanager
def folders_of(out: Path, scratch: Path | None) -> Iterator[tuple[Path, Path]]:
    """The folder of `staging_of`, and that of the files between steps.

    Args:
        scratch: below which the latter is a folder of its own, removed as the former; None: scratch/ in the former.
    Raises:
        UserError: one of them cannot be written.
    """
    with staging_of(out) as folder, nullcontext() if scratch is None else _below(scratch.absolute()) as between:
        yield folder, between or folder / "scratch"


@contextmanager
def _below(scratch: Path) -> Iterator[Path]:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"scratch={scratch} cannot be written: {error}. Choose another scratch=.") from None
    with staging.staging_of(scratch / "preprocess") as folder:
        _make(folder)
        yield folder


def remove_half_committed(out: Path) -> bool:
    """Removes what a killed commit has left at `out`: files without a manifest, of which the staging folder has one.

    Returns:
        Whether there was such a commit. On a mounted file system there is none: it is one rename.
    """
    if not isinstance(out, StorePath):
        return False
    for left in sorted(out.parent.glob("*")):
        if re.fullmatch(re.escape(out.name) + staging.STAGING, left.name) and (left / "manifest.json").is_file():
            with suppress(BlockingIOError), lease(left):
                remove_tree(out)
                return True
    return False


def make_folders(folder: Path) -> None:
    """Makes the folders of a job in the one in which its dataset is written. Raises OSError."""
    _make(folder / "scratch")


def _make(scratch: Path) -> None:
    if not on_store(scratch):  # which has no folders, and is never full
        (scratch / "progress").mkdir(parents=True, exist_ok=True)
        (scratch / RESERVE_FILE).write_bytes(bytes(1 << 16))
