"""Verification of a dataset against its manifest: every file is read and every sum computed again."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import UserError
from features.schema.schema import SPLITS
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import DeadLetterFile, Manifest, Shard, footer_sha256
from pipeline.storage.files import sha256

UNLISTED = ("manifest.json", "schema.yaml", "statistics.json")  # beside encoders/
AGAIN = "Restore it, or run jobs.preprocess again."
IDS_AT_ONCE = 1 << 26  # row ids held in memory, 0.5 GB
BATCH = 1 << 16  # rows


def verify(dataset: Dataset) -> Iterator[str]:
    """Checks a dataset, or each of several days and then their row ids together. Yields a line for each check that passed.

    Raises:
        UserError: the first fault, naming the file.
    """
    if not dataset.days:
        yield from _verify(dataset)
        return
    for day in dataset.days:
        for line in _verify(Dataset(dataset.path / day)):
            yield f"{day}  {line}"
    _check_ids(dataset)
    yield f"row ids of {len(dataset.days)} days: {sum(dataset.manifest.rows.values()):,}, all unique"


def _verify(dataset: Dataset) -> Iterator[str]:
    """`verify` of one dataset."""
    manifest, path = dataset.manifest, dataset.path
    files: list[Shard | DeadLetterFile] = [*manifest.shards, *manifest.dead_letter_files]
    _check_sums(manifest, path)
    yield f"manifest: sums over {len(manifest.shards)} shards and {sum(manifest.read.values()):,} raw rows"
    found = _check_names(dataset)
    yield f"folder: {found} files, all of them in the manifest"
    for file in files:
        _check_file(path / file.path, file)
    yield f"files: checksums of {len(files)} files, {sum(file.bytes for file in files):,} bytes"
    for shard in manifest.shards:
        _check_rows(dataset, shard)
    groups, rows = sum(len(shard.row_groups) for shard in manifest.shards), sum(manifest.rows.values())
    labels = sum(sum(observed.values()) for observed in manifest.observed.values())
    yield f"shards: columns, {rows:,} rows in {groups:,} row groups, {labels:,} observed labels and their sums"
    for part in manifest.dead_letter_files:
        count = pq.read_metadata(path / part.path).num_rows
        _check_equal(path / part.path, "rows", count, part.rows)
    yield f"dead letters: {sum(file.rows for file in manifest.dead_letter_files):,} rows"
    _check_ids(dataset)
    yield f"row ids: {rows:,}, all unique"


def _check_sums(manifest: Manifest, path: Path) -> None:
    """The rules of Manifest: sums over its shards and files, and every raw row accounted for."""
    file = path / "manifest.json"
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        _check_equal(file, f"rows of {split}", sum(shard.rows for shard in shards), manifest.rows.get(split, 0))
        for task, count in manifest.observed.get(split, {}).items():
            found = sum(shard.observed[task] for shard in shards)
            _check_equal(file, f"observed labels of {task} in {split}", found, count)
        for task, total in manifest.positives.get(split, {}).items():
            found_sum = sum(shard.positives[task] for shard in shards)
            _check_equal(file, f"sum of labels of {task} in {split}", found_sum, total)
    for shard in manifest.shards:
        _check_equal(file, f"rows of the row groups of {shard.path}", sum(shard.row_groups), shard.rows)
    bad = dict.fromkeys(manifest.read, 0)
    for part in manifest.dead_letter_files:
        bad[part.stream] = bad.get(part.stream, 0) + part.rows
    for stream, count in bad.items():
        if stream == "impressions":
            placed = sum(manifest.rows.values()) + sum(manifest.left_out.values())
        else:
            placed = sum(manifest.outcomes.get(stream, {}).values())
        _check_equal(file, f"rows of {stream} by destination", placed + count, manifest.read.get(stream, 0))
    _check_equal(file, "dead letters by reason", sum(bad.values()), sum(manifest.dead_letters.values()))


def _check_names(dataset: Dataset) -> int:
    """Counts the files in the folder. Raises UserError for one that the manifest does not name."""
    manifest = dataset.manifest
    named = {*UNLISTED, *(shard.path for shard in manifest.shards), *(file.path for file in manifest.dead_letter_files)}
    files = [file.relative_to(dataset.path) for file in sorted(dataset.path.rglob("*")) if not file.is_dir()]
    for file in files:
        if file.as_posix() not in named and file.parts[0] != "encoders":
            raise UserError(f"{dataset.path / file}: the manifest does not name this file. Move it elsewhere.")
    return len(files)


def _check_file(file: Path, known: Shard | DeadLetterFile) -> None:
    """Its size and checksums."""
    if not file.is_file():
        raise UserError(f"{file} is missing. {AGAIN}")
    _check_equal(file, "bytes", file.stat().st_size, known.bytes)
    found = sha256(file)
    if found != known.sha256:
        raise UserError(
            f"{file}: checksum {found[:8]}… is not the manifest's {known.sha256[:8]}…: "
            f"the file changed after it was written. {AGAIN}"
        )
    if isinstance(known, Shard) and footer_sha256(file) != known.footer_sha256:
        raise UserError(f"{file}: the checksum of its footer is not the manifest's. Run jobs.preprocess again.")


def _check_rows(dataset: Dataset, shard: Shard) -> None:
    """A shard's columns, rows and labels."""
    file = dataset.path / shard.path
    with pq.ParquetFile(file) as parquet:
        if different := _kinds(parquet.schema_arrow) ^ _kinds(dataset.columns):
            raise UserError(f"{file}: column {min(different)[0]} differs from the schema. {AGAIN}")
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        if sizes != shard.row_groups:
            raise UserError(f"{file}: its row groups have other numbers of rows than in the manifest. {AGAIN}")
        observed, totals = dict.fromkeys(shard.observed, 0), dict.fromkeys(shard.observed, 0.0)
        for batch in parquet.iter_batches(BATCH, columns=[f"label.{task}" for task in observed]):
            for task in observed:
                label = batch[f"label.{task}"]
                observed[task] += len(label) - label.null_count
                totals[task] += float(label.drop_null().to_numpy().sum(dtype=np.float64))
    for task, count in observed.items():
        _check_equal(file, f"observed labels of {task}", count, shard.observed[task])
        _check_equal(file, f"sum of labels of {task}", totals[task], shard.positives[task])


def _kinds(columns: pa.Schema) -> set[tuple[str, str]]:
    """Names and types, without the names of list elements, which depend on the writer."""
    lists = {field.name for field in columns if pa.types.is_list(field.type)}
    return {(f.name, f"list of {f.type.value_type}" if f.name in lists else str(f.type)) for f in columns}


def _check_ids(dataset: Dataset) -> None:
    """Row ids are unique; those of very many rows are checked in parts."""
    shards = dataset.manifest.shards
    parts = max(1, math.ceil(sum(shard.rows for shard in shards) / IDS_AT_ONCE))
    for part in range(parts):
        found = [ids[ids % parts == part] for shard in shards for ids in _ids(dataset, shard)]
        ids = np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
        duplicates = ids[1:][ids[1:] == ids[:-1]]
        if len(duplicates):
            _raise_duplicate(dataset, int(duplicates[0]))


def _ids(dataset: Dataset, shard: Shard) -> Iterator[np.ndarray]:
    """A shard's row ids as they are read, a batch at a time. Raises UserError for a missing or negative one."""
    file, offset = dataset.path / shard.path, dataset.row_id_offset(shard)
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(BATCH, columns=["row_id"]):
            ids: pa.Array = batch["row_id"]
            values = ids.drop_null().to_numpy()
            if ids.null_count or (values < 0).any():
                raise UserError(f"{file}: a row_id is missing or negative. {AGAIN}")
            yield values + offset


def _raise_duplicate(dataset: Dataset, row_id: int) -> None:
    """Raises UserError naming the files that hold a row id."""
    files = [s.path for s in dataset.manifest.shards for ids in _ids(dataset, s) for _ in ids[ids == row_id]]
    raise UserError(
        f"{dataset.path / files[1]}: row_id {row_id} is also in {files[0]}. Make source.row_id a unique column, "
        "and run jobs.preprocess again."
    )


def _check_equal(file: Path, what: str, found: float, listed: float) -> None:
    """Raises UserError unless the numbers are equal; sums of labels up to rounding, which depends on their order."""
    exact = isinstance(found, int) and isinstance(listed, int)
    if found != listed if exact else not math.isclose(found, listed, rel_tol=1e-9, abs_tol=1e-9):
        raise UserError(f"{file}: {what} are {found:,}, the manifest says {listed:,}. {AGAIN}")
