"""The manifest of a dataset: which shards it has, and where every raw row went."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from features.errors import UserError
from features.fit.fitted_files import RESTORE_HINT, encoder_files
from features.plain_json import Count, first_fault, read_json
from features.printable import printable
from features.regular_files import open_regular
from features.schema.schema import SPLITS, Schema, Split
from pipeline.dataset.entries import (
    Days,
    DeadLetterExample,
    DeadLetterFile,
    FittedFile,
    Lines,
    Shard,
    SideTableCounts,
    State,
)
from pipeline.storage.files import sha256

VERSION = 2
MAX_BYTES = 128 << 20  # of manifest.json: two kilobytes a shard or so
MOST_ROWS_PER_BYTE = 1 << 12  # of a file: a row id is not the same in all rows, so that even these do not pack better
UNLISTED_FILES = (
    "manifest.json",
    "schema.yaml",
    "statistics.json",
)  # files of a dataset that its manifest does not list


class Manifest(BaseModel):
    """What is in a dataset, and where every raw row went.

    A stream is `impressions` or the name of an outcome or side table. For impressions, `read` is the sum of `rows`, `left_out`
    and the rows of their dead letters; for an outcome, of its `outcomes` and the rows of its dead letters; for a side table, of
    its `side_tables` rows and those.

    Attributes:
        rows, observed, positives: per split, and per split and task.
        read: rows found in the raw files per stream, lines that are no rows among them.
        lines: of text files, per stream; datasets of earlier releases have none.
        left_out: impressions that a rule of the schema left out, by rule.
        outcomes: per outcome its rows by what became of them: joined, duplicate, early, late, unmatched.
        complete_until: per outcome with a window, seconds since 1970 until which it was taken to be complete.
        dead_letters: bad rows of all streams by reason.
        dead_letter_files: the files that hold them; `letters` in manifest.json.
        side_tables: per side table its rows, and how many impressions found theirs.
        absent_columns: per stream, rows of files that lack an optional column, by column.
        types: per stream whose files have types of their own, rows by the type of a column in its file, by column.
        absent_days: per stream whose file names have dates, the days without a file, each a day or FIRST..LAST.
        undecided: per outcome, impressions (bad ones among them) with no known outcome, by cause: its window was still open,
            or the files of a day that it needs are absent.
        dead_letter_examples: the first bad row of each of the most frequent reasons.
        fitted: encoders and statistics; empty in datasets of earlier releases, and of several days read as one.
        state: of histories and counters; None in datasets of earlier releases, and of several days read as one.
    """

    model_config = ConfigDict(populate_by_name=True)
    version: int = VERSION
    fingerprint: str
    rows: dict[Split, Count]
    observed: dict[Split, dict[str, Count]]
    positives: dict[Split, dict[str, FiniteFloat]]
    read: dict[str, Count]
    lines: dict[str, Lines] = {}
    left_out: dict[str, Count]
    outcomes: dict[str, dict[str, Count]]
    complete_until: dict[str, int] = {}
    absent_columns: dict[str, dict[str, Count]] = {}
    types: dict[str, dict[str, dict[str, Count]]] = {}
    dead_letters: dict[str, Count]
    dead_letter_files: list[DeadLetterFile] = Field(alias="letters")
    shards: list[Shard]
    fitted: list[FittedFile] = []
    side_tables: dict[str, SideTableCounts] = {}
    state: State | None = None
    absent_days: dict[str, list[Days]] = {}
    undecided: dict[str, dict[str, Count]] = {}
    dead_letter_examples: dict[str, DeadLetterExample] = {}


def fitted_files(folder: Path, schema: Schema) -> list[FittedFile]:
    """The entries of a dataset's encoders and statistics, as far as they lie in `folder`."""
    found = [name for name in fitted_names(schema) if (folder / name).exists()]
    return [FittedFile(path=p, bytes=(folder / p).stat().st_size, sha256=sha256(folder / p)) for p in found]


def fitted_names(schema: Schema) -> list[str]:
    """The files of a dataset's encoders and statistics, relative to its folder."""
    return [*(f"encoders/{name}" for name in encoder_files(schema)), "statistics.json"]


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a dataset's folder, checked as `check_sums` does.

    Raises:
        FileNotFoundError: it is missing.
        UserError: it is of another version, damaged, or contradicts itself.
    """
    file = folder / "manifest.json"
    try:
        content = read_json(folder, "manifest.json", MAX_BYTES)
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    version = content.get("version", VERSION) if isinstance(content, dict) else VERSION
    if version != VERSION:
        raise UserError(f"{folder}: dataset of version {printable(str(version))}, this release reads {VERSION}")
    try:
        manifest = Manifest.model_validate(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{file}: {first_fault(error)}. {RESTORE_HINT}") from None
    check_sums(manifest, file)
    return manifest


def check_sums(manifest: Manifest, file: Path) -> None:
    """The rules of Manifest: no file twice, sums over its shards and files, and every raw row accounted for.

    Raises:
        UserError: naming `file` and what does not add up.
    """
    seen: set[str] = set()
    parts: list[Shard | DeadLetterFile] = [*manifest.shards, *manifest.dead_letter_files]
    for part in parts:
        if part.path in seen:
            raise UserError(f"{file}: {part.path} is listed twice. {RESTORE_HINT}")
        seen.add(part.path)
        if part.path.partition("/")[0] in (*UNLISTED_FILES, "encoders", "state"):
            raise UserError(f"{file}: {part.path} is listed, which is another file of a dataset. {RESTORE_HINT}")
        if part.rows > MOST_ROWS_PER_BYTE * part.bytes:
            raise UserError(
                f"{file}: {part.path} cannot have {part.rows:,} rows in {part.bytes:,} bytes. {RESTORE_HINT}"
            )
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        check_equal(file, f"rows of {split}", sum(shard.rows for shard in shards), manifest.rows.get(split, 0))
        for what in ("observed", "positives"):
            totals = getattr(manifest, what).get(split, {})
            if any(getattr(shard, what).keys() != totals.keys() for shard in shards):
                raise UserError(f"{file}: {what} of {split} and of its shards are of different tasks. {RESTORE_HINT}")
            for task, total in totals.items():
                name = f"observed labels of {task}" if what == "observed" else f"sum of labels of {task}"
                found = sum(getattr(shard, what)[task] for shard in shards)
                check_equal(file, f"{printable(name)} in {split}", found, total)
    for shard in manifest.shards:
        check_equal(file, f"rows of the row groups of {shard.path}", sum(shard.row_groups), shard.rows)
    bad = dict.fromkeys(manifest.read, 0)
    for part in manifest.dead_letter_files:
        bad[part.stream] = bad.get(part.stream, 0) + part.rows
    for stream, count in bad.items():
        if stream == "impressions":
            placed = sum(manifest.rows.values()) + sum(manifest.left_out.values())
        elif stream in manifest.side_tables:
            placed = manifest.side_tables[stream].rows
        else:
            placed = sum(manifest.outcomes.get(stream, {}).values())
        what = f"rows of {printable(stream)} by destination"
        check_equal(file, what, placed + count, manifest.read.get(stream, 0))
    for stream, types in manifest.types.items():
        for column, found in types.items():
            if (total := sum(found.values())) > manifest.read.get(stream, 0):
                what = f"rows of {printable(stream)} by the type of {printable(column)}"
                raise UserError(f"{file}: {what} are {total:,}, more than were read. {RESTORE_HINT}")
    for stream, columns in manifest.absent_columns.items():
        if (most := max(columns.values(), default=0)) > manifest.read.get(stream, 0):
            raise UserError(
                f"{file}: {most:,} rows of {printable(stream)} lack a column, more than were read. {RESTORE_HINT}"
            )
    for name, causes in manifest.undecided.items():
        if sum(causes.values()) > manifest.read.get("impressions", 0):
            raise UserError(
                f"{file}: more impressions are undecided for {printable(name)} than there are. {RESTORE_HINT}"
            )
    check_equal(file, "dead letters by reason", sum(bad.values()), sum(manifest.dead_letters.values()))
    _check_lines(manifest, file)


def _check_lines(manifest: Manifest, file: Path) -> None:
    """Every line is accounted for, and those of rows and dead letters are at least as many as these."""
    for stream, lines in manifest.lines.items():
        placed = lines.header + lines.blank + lines.rows + lines.dead_letters
        check_equal(file, f"lines of {printable(stream)} by what they hold", placed, lines.physical)
        taken, read = lines.rows + lines.dead_letters, manifest.read.get(stream, 0)
        if taken < read:
            raise UserError(
                f"{file}: {read:,} rows of {printable(stream)} cannot be in {taken:,} lines. {RESTORE_HINT}"
            )


def check_equal(file: Path, what: str, found: float, listed: float) -> None:
    """Raises UserError unless the numbers are equal; sums of labels up to rounding, which depends on their order."""
    exact = isinstance(found, int) and isinstance(listed, int)
    if found != listed if exact else not math.isclose(found, listed, rel_tol=1e-9, abs_tol=1e-9):
        raise UserError(f"{file}: {what} are {found:,}, the manifest says {listed:,}. {RESTORE_HINT}")


def merge_manifests(days: dict[str, Manifest]) -> Manifest:
    """The manifest of days that are read as one: their counts added up, their files as seen from the folder of the days.

    An outcome was complete until then in all of them, which is the earliest of their times.
    """
    manifests = list(days.values())
    streams = dict.fromkeys(name for m in manifests for name in m.outcomes)
    lacking = dict.fromkeys(name for m in manifests for name in m.absent_columns)
    untils = [m.complete_until for m in manifests]
    shards = [s.model_copy(update={"path": f"{day}/{s.path}"}) for day, m in days.items() for s in m.shards]
    dead_letter_files = [
        x.model_copy(update={"path": f"{day}/{x.path}"}) for day, m in days.items() for x in m.dead_letter_files
    ]
    return Manifest(
        fingerprint=manifests[0].fingerprint,
        rows=_sums(m.rows for m in manifests),
        observed=_totals(shards, "observed"),
        positives=_totals(shards, "positives"),
        read=_sums(m.read for m in manifests),
        lines=_lines(manifests),
        left_out=_sums(m.left_out for m in manifests),
        outcomes={name: _sums(m.outcomes.get(name, {}) for m in manifests) for name in streams},
        complete_until={name: min(u[name] for u in untils) for name in untils[0] if all(name in u for u in untils)},
        absent_columns={name: _sums(m.absent_columns.get(name, {}) for m in manifests) for name in lacking},
        types=sum_types(m.types for m in manifests),
        dead_letters=_sums(m.dead_letters for m in manifests),
        dead_letter_files=dead_letter_files,
        shards=shards,
        side_tables={
            name: _side_table([m.side_tables[name] for m in manifests if name in m.side_tables])
            for name in manifests[0].side_tables
        },
        absent_days={
            stream: list(dict.fromkeys(day for m in manifests for day in m.absent_days.get(stream, [])))
            for stream in dict.fromkeys(stream for m in manifests for stream in m.absent_days)
        },
        undecided={
            name: _sums(m.undecided.get(name, {}) for m in manifests)
            for name in dict.fromkeys(name for m in manifests for name in m.undecided)
        },
        dead_letter_examples={k: example for m in reversed(manifests) for k, example in m.dead_letter_examples.items()},
    )


def _side_table(days: list[SideTableCounts]) -> SideTableCounts:
    distinct = {what: max(getattr(day, what) for day in days) for what in ("keys", "unmatched_keys")}
    return SideTableCounts(**(_sums(day.model_dump() for day in days) | distinct))


def sum_types(parts: Iterable[dict[str, dict[str, dict[str, int]]]]) -> dict[str, dict[str, dict[str, int]]]:
    """Rows by stream, column and type (see Manifest.types) of all parts together."""
    total: dict[str, dict[str, dict[str, int]]] = {}
    for part in parts:
        for stream, columns in part.items():
            for column, rows in columns.items():
                known = total.setdefault(stream, {})
                known[column] = _sums([known.get(column, {}), rows])
    return total


def _lines(manifests: list[Manifest]) -> dict[str, Lines]:
    """The lines of the streams of which all days have them."""
    known = [stream for stream in manifests[0].lines if all(stream in m.lines for m in manifests)]
    return {stream: Lines(**_sums(m.lines[stream].model_dump() for m in manifests)) for stream in known}


def _sums(counts: Iterable[Mapping[Any, int]]) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for count in counts:
        total.update(count)  # which keeps what is 0; + drops it
    return dict(total)


def _totals(shards: list[Shard], what: str) -> dict[Split, dict[str, float]]:
    totals: dict[Split, dict[str, float]] = {}
    for shard in shards:
        sums = totals.setdefault(shard.split, dict.fromkeys(getattr(shard, what), 0))
        for task, value in getattr(shard, what).items():
            sums[task] += value
    return totals


def footer_sha256(path: Path) -> str:
    """Checksum of a Parquet file's footer: Parquet has them for pages only, and a footer says which column is which.

    Raises UserError, OSError as open_regular.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
