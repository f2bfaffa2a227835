"""The folders of a job: one in which the dataset is written, beside its final place, and one for the files between steps."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from features.errors import UserError
from pipeline.dataset.listing import each_of, sizes_below
from pipeline.ingest.state import RESERVE_FILE
from pipeline.storage import staging
from pipeline.storage.files import copy_file
from pipeline.storage.store_path import StorePath, on_store


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


def make_folders(folder: Path) -> None:
    """Makes the folders of a job in the one in which its dataset is written. Raises OSError."""
    _make(folder / "scratch")


def _make(scratch: Path) -> None:
    if not on_store(scratch):  # which has no folders, and is never full
        (scratch / "progress").mkdir(parents=True, exist_ok=True)
        (scratch / RESERVE_FILE).write_bytes(bytes(1 << 16))


def fetch(folder: Path, target: Path) -> None:
    """Copies what workers have made from a store."""
    assert isinstance(folder, StorePath)

    def copy(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(folder / name, target / name)

    each_of(folder, copy, sizes_below(folder))
