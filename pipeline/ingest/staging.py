"""The folder in which a dataset is written, beside its final place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import UserError
from pipeline.ingest.state import RESERVE_FILE
from pipeline.storage import staging


@contextmanager
def staging_of(out: Path) -> Iterator[Path]:
    """As pipeline.storage.staging.staging_of, with the folders of a job in it. Raises UserError where there can be none."""
    with staging.staging_of(out) as folder:
        try:
            make_folders(folder)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error}. Choose another out=.") from None
        yield folder


def make_folders(folder: Path) -> None:
    """Makes the folders of a job in the one in which its dataset is written. Raises OSError."""
    (folder / "scratch" / "progress").mkdir(parents=True, exist_ok=True)
    (folder / "scratch" / RESERVE_FILE).write_bytes(bytes(1 << 16))
