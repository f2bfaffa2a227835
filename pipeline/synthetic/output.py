"""Where a generated log is written, and how its files appear there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.storage.files import copy_file
from pipeline.storage.store_path import Place, on_store


class Output(BaseModel):
    """Where a log is written, a setting of both jobs."""

    model_config = ConfigDict(extra="forbid")
    out: Place


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A folder to write files to, which then appear in `out`, one after the other by name: none is ever half written."""
    out.mkdir(parents=True, exist_ok=True)
    beside = None if on_store(out) else out.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{out.name}-") as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            if on_store(out):
                copy_file(path, out / path.name)
            else:
                path.replace(out / path.name)
