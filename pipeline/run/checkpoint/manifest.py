"""The manifest of a checkpoint, which is written last: its step, its position in the data, its files and checksums."""

import errno
import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError
from features.plain_json import Count, first_fault
from features.regular_files import lstat_regular, read_regular, refuse_link
from pipeline.run.run import config_hash
from pipeline.storage.files import sha256
from pipeline.storage.ranges import read_ranges
from pipeline.storage.store_path import on_store
from pipeline.storage.versions import versions_below

VERSION = 3  # of up to 2, the index was a pickle
MAX_MANIFEST_BYTES = 64 << 20
INDEX = "tensors.json"  # see pipeline.run.checkpoint.index; on a store the name has a suffix of its writer's own
CHECKED_BYTES = 64 << 20  # of a file on a store that are read at once, while those before them are checked

# Files lie in the checkpoint's own folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]


# Errors that say what is wrong with a file. Others are of the moment, or of who asks: the file may be whole.
DAMAGE = {None, errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


class UnreadableError(UserError):
    """A checkpoint that cannot be read now, as while its store does not answer: nothing says that it is damaged."""


class _Version(BaseModel):
    version: int = 1


class CheckpointManifest(BaseModel):
    """What a checkpoint is and what its files are.

    Attributes:
        step: batches passed, those of `skipped` included.
        rows: trained on, without padding. left_out: passed but not trained on, in skipped batches or unreadable row groups.
        skipped: steps whose batch is left out, since its loss is not finite; some may be later than `step`.
        epoch, cursors: the loader's position.
        ranks: that wrote it.
        seed, window, batch_size, data (hash of the train split's shards): all else that the order of rows depends on.
        fingerprint: of the schema. encoders: of what was fitted. config: hash of what shapes the state (model and optimisers).
        files: name to (bytes, sha256).
        checksum: of all other fields, since a cursor with a flipped digit is still valid JSON.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    version: int = VERSION
    step: Count
    rows: Count
    left_out: Count = 0
    skipped: list[Count] = []
    epoch: Count
    cursors: list[Count]
    ranks: Annotated[Count, Field(ge=1)] = 1
    seed: int
    window: Count
    batch_size: Count
    data: str
    fingerprint: str
    encoders: str
    config: str
    files: dict[FileName, tuple[Count, str]] = {}
    checksum: str = ""

    def sealed(self, files: dict[str, tuple[int, str]]) -> "CheckpointManifest":
        """The same with its files and its checksum."""
        content = self.model_copy(update={"files": files}).model_dump(exclude={"checksum"})
        return self.model_copy(update={"files": files, "checksum": config_hash(content)})


def folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def read(path: Path) -> CheckpointManifest:
    """A checkpoint's manifest. Raises UserError if it is missing, damaged or of another version; UnreadableError."""
    refuse_link(path)
    try:
        content = read_regular(path, "manifest.json", MAX_MANIFEST_BYTES)
        version = _Version.model_validate_json(content).version
        if version != VERSION:
            raise UserError(
                f"{path}: checkpoint of version {version}, this release reads {VERSION}: the index of older ones is a pickle, "
                "which could run code. Train again, or load it with the release that wrote it."
            )
        manifest = CheckpointManifest.model_validate_json(content)
    except (OSError, ValueError, RecursionError) as error:  # damaged text is no UTF-8, no JSON, or no manifest
        if isinstance(error, OSError):
            _raise_unreadable(path, error)
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {first_fault(error)}"
        raise UserError(f"{path}: not a checkpoint, manifest.json {reason}") from None
    if manifest != manifest.sealed(manifest.files):
        raise UserError(f"{path / 'manifest.json'}: its checksum is not its content's: it changed after it was written")
    return manifest


def index_of(manifest: CheckpointManifest) -> str:
    """The name of a checkpoint's index."""
    return next((name for name in manifest.files if re.fullmatch(r"tensors-[0-9a-f]{12}\.json", name)), INDEX)


def check(path: Path, part: int = 0, parts: int = 1) -> CheckpointManifest:
    """Reads a checkpoint's manifest and compares every file with it.

    Args:
        part, parts: of the files only each `parts`-th, from `part` on: ranks share the work.
    Raises:
        UserError: naming what is missing or differs. UnreadableError.
    """
    manifest = read(path)
    if index_of(manifest) not in manifest.files:
        raise UserError(f"{path}: not a checkpoint, its manifest names no {INDEX}")
    for name, (size, checksum) in sorted(manifest.files.items())[part::parts]:
        try:
            _check_file(path, name, size, checksum)
        except OSError as error:
            _raise_unreadable(path, error)
            raise
    return manifest


def _check_file(path: Path, name: str, size: int, checksum: str) -> None:
    file = path / name
    if (status := lstat_regular(path, name)) is None:
        raise UserError(f"{file} is missing")
    if status.st_size != size:
        raise UserError(f"{file} has {status.st_size} bytes, the manifest says {size}")
    if (_checksum_on_store(file, size) if on_store(file) else sha256(file)) != checksum:
        raise UserError(f"{file}: its checksum is not the manifest's: it changed after it was written")


def _raise_unreadable(path: Path, error: OSError) -> None:
    """Raises UnreadableError, unless the error says that a file is damaged or missing."""
    if error.errno not in DAMAGE:
        raise UnreadableError(
            f"{path}: cannot be read now: {error.strerror}. Run the same command again once it can be."
        ) from None


def _checksum_on_store(file: Path, size: int) -> str:
    digest, starts = hashlib.sha256(), range(0, size, CHECKED_BYTES)

    def block(start: int) -> bytes:
        return read_ranges(file, [(start, min(start + CHECKED_BYTES, size))])[0]

    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(block, start) for start in starts[:1]]
        for start in starts:
            content = coming.pop().result()
            coming = [ahead.submit(block, start + CHECKED_BYTES)] if start + CHECKED_BYTES < size else []
            digest.update(content)
    return digest.hexdigest()


def steps(checkpoints: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending; `check` says whether their files are whole."""
    found: Iterable[Path]
    if on_store(checkpoints):  # one listing, not a question a checkpoint
        found = {file.parent for file in versions_below(checkpoints) if file.name == "manifest.json"}
        found = [path for path in found if path.parent == checkpoints and path.name.startswith("step-")]
    else:
        found = (p for p in checkpoints.glob("step-*") if not p.is_symlink() and (p / "manifest.json").exists())
    return sorted(int(number) for p in found if (number := p.name.removeprefix("step-")).isdecimal())


def chosen(checkpoints: Path, step: int | Literal["newest"]) -> int:
    """The step of a committed checkpoint: that one, or the newest. Raises UserError where there is none."""
    found = steps(checkpoints)
    wanted = found[-1] if found and step == "newest" else step
    if not isinstance(wanted, int) or wanted not in found:
        what = "any" if step == "newest" else f"step {step}"
        raise UserError(f"{checkpoints}: no checkpoint ({what}); there are {found or 'none'}")
    return wanted
