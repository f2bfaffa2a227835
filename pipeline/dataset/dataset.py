"""A dataset on disk: sharded Parquet with a manifest that is written last, and nothing that is half there."""

import copy
import ctypes
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from features.errors import UserError
from features.fit.encoders import Encoders, arrow_schema
from features.schema.schema import SPLITS, Schema, Split

VERSION = 2
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
DAY_STRIDE = 1 << 56  # between the row ids of days: room for 65,536 files, each of which has 1 << 40
MAX_DAYS = (1 << 63) // DAY_STRIDE


class Shard(BaseModel):
    """One Parquet file.

    Attributes:
        path: relative to the dataset.
        row_groups: rows of each row group, in order.
        sha256, footer_sha256: of the whole file, and of the part that says where columns lie.
        observed, positives: per task, rows with a label and the sum of the labels.
    """

    path: str
    split: Split
    rows: int
    bytes: int
    sha256: str
    footer_sha256: str
    row_groups: list[int]
    observed: dict[str, int]
    positives: dict[str, float]


class Letters(BaseModel):
    """One Parquet file of dead letters, rows of a raw file that could not be used: stream, file, line, reason, raw."""

    path: str
    stream: str
    rows: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What is in a dataset, and where every raw row went.

    A stream is `impressions` or the name of an outcome. For impressions, `read` is the sum of `rows`, `left_out` and the
    rows of their dead letters; for an outcome, of its `outcomes` and the rows of its dead letters.

    Attributes:
        rows, observed, positives: per split, and per split and task.
        read: rows found in the raw files per stream, lines that are no rows among them.
        left_out: impressions that a rule of the schema left out, by rule.
        outcomes: per outcome its rows by what became of them: joined, duplicate, early, late, unmatched.
        complete_until: per outcome with a window, seconds since 1970 until which it was taken to be complete.
        dead_letters: bad rows of all streams by reason.
        letters: the files that hold them.
    """

    version: int = VERSION
    fingerprint: str
    rows: dict[Split, int]
    observed: dict[Split, dict[str, int]]
    positives: dict[Split, dict[str, float]]
    read: dict[str, int]
    left_out: dict[str, int]
    outcomes: dict[str, dict[str, int]]
    complete_until: dict[str, int] = {}
    dead_letters: dict[str, int]
    letters: list[Letters]
    shards: list[Shard]


class Dataset:
    """A committed dataset, opened for reading: `manifest`, `schema`, `encoders` and the shards of a split.

    Attributes:
        days: the folders of which `open_dataset` has put it together, in order; empty for one dataset.
    """

    def __init__(self, path: Path) -> None:
        """Checks what can be checked without reading rows.

        Raises:
            UserError: no manifest, a version or fingerprint that does not fit, a shard missing or of another size.
        """
        self.path = self.encoded_by = path
        self.days: list[str] = []
        try:
            self.manifest = Manifest.model_validate_json((path / "manifest.json").read_text())
        except FileNotFoundError:
            raise UserError(_no_dataset(path)) from None
        except ValidationError as error:
            raise UserError(f"{path}/manifest.json: {error.errors()[0]['msg']}. Run jobs.preprocess again.") from None
        if self.manifest.version != VERSION:
            raise UserError(f"{path}: dataset of version {self.manifest.version}, this release reads {VERSION}")
        self.schema = Schema.load(path / "schema.yaml")
        self.expect(self.schema.fingerprint, "its own schema.yaml")
        self.columns = arrow_schema(self.schema)  # of the shards, whichever tasks are looked at
        for shard in self.manifest.shards:
            file = path / shard.path
            size = file.stat().st_size if file.exists() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
                raise UserError(f"{file} {found}. Restore it, or run jobs.preprocess again.")

    def only(self, tasks: Sequence[str] | None) -> "Dataset":
        """The same dataset with some of the tasks (None: all). Raises UserError for one that does not exist."""
        part = copy.copy(self)
        part.schema = self.schema.only(tasks)
        part.__dict__.pop("encoders", None)
        return part

    @cached_property
    def encoders(self) -> Encoders:
        """The encoders its rows went through."""
        return Encoders.load(self.encoded_by / "encoders", self.schema)

    @cached_property
    def encoders_id(self) -> str:
        """16 hex digits of what was fitted: ids and scales mean the same in datasets where it is the same."""
        folder = self.encoded_by / "encoders"
        try:
            files = [sha256(file) for file in [*sorted(folder.rglob("*.parquet")), folder / "encoders.json"]]
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing. Restore it, or run jobs.preprocess again.") from None
        return hashlib.sha256("".join(files).encode()).hexdigest()[:16]

    def expect(self, fingerprint: str, owner: str) -> None:
        """Raises UserError unless `owner` (named in the message) has the dataset's fingerprint."""
        if self.manifest.fingerprint != fingerprint:
            raise UserError(
                f"{self.path} was written for schema {self.manifest.fingerprint}, but {owner} is {fingerprint}. "
                "Preprocess with that schema, or use a dataset of this one."
            )

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, which must have rows. Raises UserError where it has none."""
        found = [shard for shard in self.manifest.shards if shard.split == split and shard.rows]
        if not found:
            raise UserError(f"{self.path}: split {split} is empty. Change split in the schema, or give more input.")
        return found

    def day_of(self, shard: Shard) -> str:
        """The day's folder that a shard lies in; the empty text where there are no days."""
        return shard.path.partition("/")[0] if self.days else ""

    def row_id_offset(self, shard: Shard) -> int:
        """What to add to a shard's row ids: each day numbers its files from 0, unless the schema names a column of ids."""
        if not self.days or self.schema.source.row_id:
            return 0
        return self.days.index(self.day_of(shard)) * DAY_STRIDE

    @property
    def name(self) -> str:
        """Which rows these are, for records of what was made of them: its folder, or FOLDER/FIRST..LAST of its days."""
        return str(self.path / _span(self.days[0], self.days[-1])) if self.days else str(self.path)


def open_dataset(path: Path, days: str | None = None) -> Dataset:
    """A dataset, or those of some days below `path` as one: the days' rows follow each other.

    Where the schema names no source.row_id, those of the first day keep their row ids, those of the next have DAY_STRIDE
    more, and so on.

    Args:
        days: FIRST..LAST or one day, ISO dates; None: `path` is the dataset.
    Raises:
        UserError: as Dataset; a day is missing, or was written for another schema or with other encoders than the first;
            more days than row ids have room for.
    """
    if days is None:
        return Dataset(path)
    parts = [Dataset(path / day) for day in _dates(days)]
    first = parts[0]
    for part in parts[1:]:
        part.expect(first.manifest.fingerprint, f"{first.path}")
        if part.encoders_id != first.encoders_id:
            raise UserError(
                f"{part.path} was encoded with {part.encoders_id}, {first.path} with {first.encoders_id}: their ids mean "
                f"different things. Run jobs.preprocess again with encoders.from={first.path}."
            )
    if len(parts) > MAX_DAYS and not first.schema.source.row_id:
        raise UserError(
            f"days={days}: {len(parts)} days, of which at most {MAX_DAYS} can be read as one where row ids are given by file "
            "and place. Read fewer, or name a column of ids as source.row_id and run jobs.preprocess again."
        )
    whole = copy.copy(first)
    whole.path, whole.days = path, [part.path.name for part in parts]
    whole.manifest = _together({part.path.name: part.manifest for part in parts})
    return whole


def day_ranges(folder: Path) -> list[str]:
    """The days whose datasets lie in a folder, in order, as the ranges FIRST..LAST that `open_dataset` takes."""
    days = sorted(day for file in folder.glob("*/manifest.json") if (day := _day(file.parent.name)))
    ranges: list[list[date]] = []
    for day in days:
        if ranges and day == ranges[-1][1] + timedelta(days=1):
            ranges[-1][1] = day
        else:
            ranges.append([day, day])
    return [_span(first.isoformat(), last.isoformat()) for first, last in ranges]


def _no_dataset(path: Path) -> str:
    """Why there is nothing to open."""
    if ranges := day_ranges(path):
        return (
            f"{path} is no dataset itself; it holds those of the days {', '.join(ranges)}. Where a job takes days, say "
            f"days={ranges[0]}, or give it one: {path / ranges[0][:10]}."
        )
    return f"{path}: no dataset (manifest.json is missing). Run jobs.preprocess out={path} first."


def _together(days: dict[str, Manifest]) -> Manifest:
    """The manifest of days that are read as one: their counts added up, their files as seen from the folder of the days.

    An outcome was complete until then in all of them, which is the earliest of their times.
    """
    manifests = list(days.values())
    untils = [m.complete_until for m in manifests]
    shards = [s.model_copy(update={"path": f"{day}/{s.path}"}) for day, m in days.items() for s in m.shards]
    letters = [x.model_copy(update={"path": f"{day}/{x.path}"}) for day, m in days.items() for x in m.letters]
    return Manifest(
        fingerprint=manifests[0].fingerprint,
        rows=_sums(m.rows for m in manifests),
        observed=_totals(shards, "observed"),
        positives=_totals(shards, "positives"),
        read=_sums(m.read for m in manifests),
        left_out=_sums(m.left_out for m in manifests),
        outcomes={name: _sums(m.outcomes[name] for m in manifests) for name in manifests[0].outcomes},
        complete_until={name: min(u[name] for u in untils) for name in untils[0] if all(name in u for u in untils)},
        dead_letters=_sums(m.dead_letters for m in manifests),
        letters=letters,
        shards=shards,
    )


def _sums(counts: Iterable[Mapping[Any, int]]) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)  # which keeps what is 0; + drops it
    return dict(total)


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}..{last}"


def _day(name: str) -> date | None:
    """The day that a folder is named by, None where it is another word."""
    try:
        day = date.fromisoformat(name)
    except ValueError:
        return None
    return day if day.isoformat() == name else None


def _dates(days: str) -> list[str]:
    first, _, last = days.partition("..")
    try:
        start, stop = date.fromisoformat(first), date.fromisoformat(last or first)
    except ValueError as error:
        raise UserError(f"days={days}: {error}. Write 2026-11-01..2026-11-21, or one day.") from None
    if stop < start:
        raise UserError(f"days={days}: the last day is before the first")
    return [(start + timedelta(days=day)).isoformat() for day in range((stop - start).days + 1)]


def commit(staging: Path, out: Path, schema: Schema, shards: list[Shard], counts: dict[str, Any]) -> Manifest:
    """Names the shards, writes the manifest last, drops staging/scratch and moves the folder into place in one rename.

    A dataset that stands at `out` changes places with the new one in the same instant.

    Args:
        counts: what the manifest says of raw rows: read, left_out, outcomes, dead_letters, letters.
    """
    final = []
    for split in dict.fromkeys(shard.split for shard in shards):
        ours = [shard for shard in shards if shard.split == split]
        (staging / split).mkdir()
        for index, shard in enumerate(ours):
            path = f"{split}/part-{index:05d}-of-{len(ours):05d}.parquet"
            (staging / shard.path).rename(staging / path)
            final.append(shard.model_copy(update={"path": path}))
    manifest = Manifest(
        fingerprint=schema.fingerprint,
        rows={s: sum(x.rows for x in final if x.split == s) for s in SPLITS},
        observed=_totals(final, "observed"),
        positives=_totals(final, "positives"),
        shards=final,
        **counts,
    )
    (staging / "schema.yaml").write_text(
        yaml.safe_dump(schema.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    )
    write_json(staging / "manifest.json", manifest.model_dump())
    shutil.rmtree(staging / "scratch", ignore_errors=True)
    if out.exists():
        exchange(staging, out)  # what stood there is now the staging folder, which its owner removes
    else:
        staging.rename(out)
    flushed(out.parent)
    return manifest


def exchange(one: Path, other: Path) -> None:
    """Lets two folders change names in one step, where the system can (Linux: renameat2), else in two."""
    both = [os.fsencode(path) for path in (one, other)]
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and libc.renameat2(AT_FDCWD, both[0], AT_FDCWD, both[1], RENAME_EXCHANGE) == 0:
        return
    aside = other.with_name(f"{other.name}.old-{os.getpid()}")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def flushed(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _totals(shards: list[Shard], what: str) -> dict[Split, dict[str, float]]:
    totals: dict[Split, dict[str, float]] = {}
    for shard in shards:
        sums = totals.setdefault(shard.split, dict.fromkeys(getattr(shard, what), 0))
        for task, value in getattr(shard, what).items():
            sums[task] += value
    return totals


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file aside, flushes it to disk and renames it into place: a reader sees all of it or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def footer_sha256(path: Path) -> str:
    """Checksum of a Parquet file's footer: Parquet has them for pages only, and a footer says which column is which."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-min(8 + length, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def sha256(path: Path) -> str:
    """Checksum of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
