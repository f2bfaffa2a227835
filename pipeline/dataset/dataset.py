"""A dataset on disk: opened with its schema and encoders, and committed whole or not at all."""

import copy
import hashlib
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.fit.encoders import Encoders, arrow_schema
from features.fit.fitted_files import RESTORE_HINT, encoder_files
from features.regular_files import lstat_regular
from features.schema.schema import SPLITS, Schema, Split
from features.yaml_text import yaml_of
from pipeline.dataset.days import (
    DAY_STRIDE,
    MAX_DAYS,
    MissingDays,
    chosen_days,
    day_of,
    day_ranges,
    folder_of_day,
    ranges_of,
)
from pipeline.dataset.entries import Shard
from pipeline.dataset.listing import each_of, sizes_below
from pipeline.dataset.manifest import Manifest, _totals, fitted_files, fitted_names, merge_manifests, read_manifest
from pipeline.dataset.past_state import check_listed, stale_days, stale_words
from pipeline.storage.files import remove_tree, sha256, storage_of, write_json
from pipeline.storage.local import fsync_all
from pipeline.storage.store_path import StorePath, on_store

logger = logging.getLogger(__name__)


class Dataset:
    """A committed dataset, opened for reading: `manifest`, `schema`, `encoders` and the shards of a split.

    Attributes:
        days: the folders of which `open_dataset` has put it together, in order; empty for one dataset.
    """

    def __init__(self, path: Path) -> None:
        """Checks what can be checked without reading rows.

        Raises:
            UserError: no manifest, a version or fingerprint that does not fit, a shard missing or of another size, or a
                file that is a link or no regular one.
        """
        self.path = self.encoded_by = path
        self.days: list[str] = []
        try:
            self.manifest = read_manifest(path)
        except FileNotFoundError:
            raise UserError(_no_dataset(path)) from None
        lstat_regular(path, "schema.yaml")
        self.schema = Schema.load(path / "schema.yaml")
        self.check_compatible(self.schema.fingerprint, "its own schema.yaml")
        self.columns = arrow_schema(self.schema)  # of the shards, whichever tasks are chosen
        if {file.path for file in self.manifest.fitted} - {*fitted_names(self.schema)}:
            raise UserError(f"{path}/manifest.json: fitted lists other files than those of schema.yaml. {RESTORE_HINT}")
        check_listed(self.manifest, self.schema, path)
        listed = sizes_below(path) if isinstance(path, StorePath) else None
        for shard in self.manifest.shards:
            if shard.observed.keys() != self.schema.tasks.keys():
                raise UserError(
                    f"{path}/manifest.json: {shard.path} has labels of other tasks than schema.yaml. {RESTORE_HINT}"
                )
            size = listed.get(shard.path) if listed is not None else _size(path, shard.path)
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
                raise UserError(f"{path / shard.path} {found}. {RESTORE_HINT}")

    def only(self, tasks: Sequence[str] | None) -> "Dataset":
        """The same dataset with some of the tasks (None: all). Raises UserError for one that does not exist."""
        part = copy.copy(self)
        part.schema = self.schema.only(tasks)
        part.__dict__.pop("encoders", None)
        return part

    def of(self, shards: list[Shard]) -> "Dataset":
        """The same dataset with some of its shards."""
        part = copy.copy(self)
        part.manifest = self.manifest.model_copy(update={"shards": shards})
        return part

    @cached_property
    def encoders(self) -> Encoders:
        """The encoders its rows went through; a vocabulary is read when its values are first used."""
        return Encoders.open(self.encoded_by / "encoders", self.schema)

    @cached_property
    def encoders_id(self) -> str:
        """16 hex digits of what was fitted: ids and scales mean the same in datasets where it is the same."""
        names = encoder_files(self.schema)
        known = {file.path: file.sha256 for file in self.manifest.fitted}
        if on_store(self.encoded_by) and all(f"encoders/{name}" in known for name in names):
            return encoders_id(known[f"encoders/{name}"] for name in names)  # to read them all takes long
        return encoders_id(sha256(require_file(self.encoded_by, f"encoders/{name}")) for name in names)

    def base_rates(self) -> dict[str, float]:
        """Per binary task the weighted mean of its train labels, half a row away from 0 and 1; without labels 1/2.

        A rate of 0 or 1 would have no logit.
        """
        shards = [shard for shard in self.manifest.shards if shard.split == "train"]
        rates = {}
        for name, task in self.schema.tasks.items():
            if task.kind == "binary":
                weight = sum(shard.weights.get(name, shard.observed[name]) for shard in shards)
                positive = sum(shard.weighted.get(name, shard.positives[name]) for shard in shards)
                rates[name] = min(max((positive + 0.5) / (weight + 1), 1e-12), 1 - 1e-12)
        return rates

    def check_compatible(self, fingerprint: str, owner: str) -> None:
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
        """Which rows these are, for records of what was made of them: its folder, or FOLDER/FIRST..LAST,… of its days."""
        ranges = ranges_of(day for name in self.days if (day := day_of(name)))
        return str(self.path / ",".join(ranges)) if ranges else str(self.path)


def encoders_id(checksums: Iterable[str]) -> str:
    """16 hex digits of the checksums of the encoders' files, in the order of `encoder_files`."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:16]


def open_dataset(path: Path, days: str | None = None, missing_days: MissingDays = "refuse") -> Dataset:
    """A dataset, or those of some days below `path` as one: the days' rows follow each other.

    Where the schema names no source.row_id, those of the first day keep their row ids, those of the next have DAY_STRIDE
    more, and so on.

    Args:
        days: FIRST..LAST, a day, or several of these with commas between, ISO dates; None: `path` is the dataset.
        missing_days: skip leaves days without a dataset out.
    Raises:
        UserError: as Dataset; `missing_days` without days; a day is missing, or was written for another schema or with other
            encoders than the first; more days than row ids have room for.
    """
    if days is None:
        if missing_days == "skip":
            raise UserError(
                "missing_days=skip: no days are named of which one may be missing. Set days=, or remove it."
            )
        return Dataset(path)
    parts = each_of(path, lambda day: Dataset(folder_of_day(path, day)), chosen_days(path, days, missing_days))
    first = parts[0]
    for part in parts[1:]:
        part.check_compatible(first.manifest.fingerprint, f"{first.path}")
        if part.encoders_id != first.encoders_id:
            raise UserError(
                f"{part.path} was encoded with {part.encoders_id}, {first.path} with {first.encoders_id}: their ids mean "
                f"different things. Run jobs.preprocess again with encoders.from={first.path}."
            )
        if part.schema.kept != first.schema.kept:
            raise UserError(
                f"{part.path} keeps the columns {list(part.schema.keep)}, {first.path} keeps {list(first.schema.keep)}: days "
                "that are read as one must keep the same. Run jobs.preprocess again for one of them, with the other's `keep`."
            )
    if len(parts) > MAX_DAYS and not first.schema.source.row_id:
        raise UserError(
            f"days={days}: {len(parts)} days, of which at most {MAX_DAYS} can be read as one where row ids are given by file "
            "and place. Read fewer, or name a column of ids as source.row_id and run jobs.preprocess again."
        )
    if stale := stale_days(path, {part.path.name: part.manifest for part in parts}):
        logger.warning("%s: %s", path, stale_words(stale))
    whole = copy.copy(first)
    whole.path, whole.days = path, [part.path.name for part in parts]
    whole.manifest = merge_manifests({part.path.name: part.manifest for part in parts})
    return whole


def require_file(folder: Path, name: str) -> Path:
    """The path of a file below a dataset's folder. Raises UserError where it is missing, a link or no regular file."""
    if lstat_regular(folder, name) is None:
        raise UserError(f"{folder / name} is missing. {RESTORE_HINT}")
    return folder / name


def _size(folder: Path, name: str) -> int | None:
    status = lstat_regular(folder, name)
    return status and status.st_size


def _no_dataset(path: Path) -> str:
    """Why there is nothing to open."""
    if ranges := day_ranges(path):
        return (
            f"{path} is no dataset itself; it holds those of the days {', '.join(ranges)}. Where a job takes days, set "
            f"days={ranges[0]}, or give it one: {path / ranges[0][:10]}."
        )
    return f"{path}: no dataset (manifest.json is missing). Run jobs.preprocess out={path} first."


def shard_path(split: Split, index: int, count: int) -> str:
    """Where one of the shards of a split lies, relative to the dataset."""
    return f"{split}/part-{index:05d}-of-{count:05d}.parquet"


def commit(staging: Path, out: Path, schema: Schema, shards: list[Shard], counts: dict[str, Any]) -> Manifest:
    """Names the shards, writes the manifest last, drops staging/scratch and moves the folder into place in one rename.

    A dataset that stands at `out` changes places with the new one in the same instant.

    Args:
        counts: what the manifest says of raw rows: read, left_out, outcomes, dead_letters, dead_letter_files.
    """
    final = []
    for split in dict.fromkeys(shard.split for shard in shards):
        ours = [shard for shard in shards if shard.split == split]
        for index, shard in enumerate(ours):
            path = shard_path(split, index, len(ours))
            if shard.path != path:
                (staging / split).mkdir(exist_ok=True)
                (staging / shard.path).rename(staging / path)
            final.append(shard.model_copy(update={"path": path}))
    manifest = Manifest(
        fingerprint=schema.fingerprint,
        rows={s: sum(x.rows for x in final if x.split == s) for s in SPLITS},
        observed=_totals(final, "observed"),
        positives=_totals(final, "positives"),
        shards=final,
        fitted=fitted_files(staging, schema),
        **counts,
    )
    (staging / "schema.yaml").write_text(yaml_of(schema.model_dump(mode="json", exclude_unset=True)))
    write_json(staging / "manifest.json", manifest.model_dump(by_alias=True))
    remove_tree(staging / "scratch")
    if not on_store(staging):
        fsync_all(staging)  # encoders, too: a dataset that is there is whole, also after a power cut
    storage_of(out).commit(staging, out)
    return manifest
