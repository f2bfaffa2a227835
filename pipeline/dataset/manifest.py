"""The manifest of a dataset: which shards it has, and where every raw row went."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from features.schema.schema import Split

VERSION = 2


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


class DeadLetterFile(BaseModel):
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
        dead_letter_files: the files that hold them; `letters` in manifest.json.
    """

    model_config = ConfigDict(populate_by_name=True)
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
    dead_letter_files: list[DeadLetterFile] = Field(alias="letters")
    shards: list[Shard]


def merge_manifests(days: dict[str, Manifest]) -> Manifest:
    """The manifest of days that are read as one: their counts added up, their files as seen from the folder of the days.

    An outcome was complete until then in all of them, which is the earliest of their times.
    """
    manifests = list(days.values())
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
        left_out=_sums(m.left_out for m in manifests),
        outcomes={name: _sums(m.outcomes[name] for m in manifests) for name in manifests[0].outcomes},
        complete_until={name: min(u[name] for u in untils) for name in untils[0] if all(name in u for u in untils)},
        dead_letters=_sums(m.dead_letters for m in manifests),
        dead_letter_files=dead_letter_files,
        shards=shards,
    )


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
    """Checksum of a Parquet file's footer: Parquet has them for pages only, and a footer says which column is which."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-min(8 + length, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()
