"""Verification of a dataset against its manifest: every file is read and every sum computed again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import UserError, one_line
from features.fit.encoders import Encoders
from features.fit.fitted_files import RESTORE_HINT, encoder_files
from features.parquet_limits import check_footer
from features.parquet_pages import check_pages
from features.printable import printable
from features.regular_files import local_file, lstat_regular
from pipeline.dataset.card.card import read_card
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Listed, Shard
from pipeline.dataset.listing import each_of, sizes_below
from pipeline.dataset.manifest import UNLISTED_FILES, check_equal, footer_sha256
from pipeline.dataset.past_state import parquet_file, verify_state
from pipeline.dataset.shards import check_ids, check_row_groups, open_shard, table_sizes
from pipeline.storage.files import sha256
from pipeline.storage.patience import cure_of
from pipeline.storage.store_path import StorePath, on_store

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
    states = manifest.state.files if manifest.state else []
    files: list[Listed] = [*manifest.shards, *manifest.dead_letter_files, *manifest.fitted, *states]
    yield f"manifest: sums over {len(manifest.shards)} shards and {sum(manifest.read.values()):,} raw rows"
    if manifest.lines:
        yield f"lines: {_lines(dataset)}"
    found = _check_names(dataset)
    yield f"folder: {found} files, all of them in the manifest"
    each_of(path, lambda file: _check_file(path, file), files)
    yield f"files: checksums of {len(files)} files, {sum(file.bytes for file in files):,} bytes"
    vocabularies = Encoders.load(dataset.encoded_by / "encoders", dataset.schema).vocabularies
    read_card(path, dataset.schema)
    yield f"encoders: {sum(map(len, vocabularies.values())):,} values in {len(vocabularies)} vocabularies; statistics"
    if manifest.state:
        yield verify_state(path, manifest.state, dataset.schema)
    sizes = table_sizes(dataset)
    each_of(path, lambda shard: _check_rows(dataset, shard, sizes), manifest.shards)
    groups, rows = sum(len(shard.row_groups) for shard in manifest.shards), sum(manifest.rows.values())
    labels = sum(sum(observed.values()) for observed in manifest.observed.values())
    yield f"shards: columns, {rows:,} rows in {groups:,} row groups, {labels:,} observed labels and their sums"
    for part in manifest.dead_letter_files:
        with _opened(path / part.path, part.bytes) as parquet:
            check_equal(path / part.path, "rows", parquet.metadata.num_rows, part.rows)
    yield f"dead letters: {sum(file.rows for file in manifest.dead_letter_files):,} rows"
    _check_ids(dataset)
    yield f"row ids: {rows:,}, all unique"


def _lines(dataset: Dataset) -> str:
    """Where the lines of each stream went. Raises UserError where a row is a line, and there are more of these than rows."""
    source, found = dataset.schema.source, []
    others = source.outcomes.keys() | source.tables.keys()
    for stream, lines in dataset.manifest.lines.items():
        read = dataset.manifest.read.get(stream, 0)
        if not source.format_of(stream if stream in others else None).multiline and lines.rows > read:
            raise UserError(
                f"{dataset.path}/manifest.json: {lines.rows:,} lines of rows of {printable(stream)} are not in {read:,} rows. "
                f"{RESTORE_HINT}"
            )
        found.append(
            f"{lines.physical:,} of {printable(stream)} = {lines.header:,} header + {lines.blank:,} blank + {lines.rows:,} of "
            f"rows + {lines.dead_letters:,} of dead letters"
        )
    return "; ".join(found)


def _check_names(dataset: Dataset) -> int:
    """Counts the files in the folder. Raises UserError for one that nothing names, or that is no regular file."""
    manifest, path = dataset.manifest, dataset.path
    named = {*UNLISTED_FILES, *(f"encoders/{name}" for name in encoder_files(dataset.schema))}
    named |= {shard.path for shard in manifest.shards} | {file.path for file in manifest.dead_letter_files}
    named |= {file.path for file in manifest.state.files} if manifest.state else set()
    listed = sizes_below(path) if isinstance(path, StorePath) else None
    files = (
        sorted(listed)
        if listed is not None
        else [
            file.relative_to(path).as_posix()
            for file in sorted(path.rglob("*"))
            if file.is_symlink() or not file.is_dir()
        ]
    )
    for file in files:
        if file not in named:
            raise UserError(f"{path / printable(file)}: the manifest does not name this file. Move it elsewhere.")
        if listed is None:
            lstat_regular(path, file)
    return len(files)


def _check_file(dataset: Path, known: Listed) -> None:
    """Its size and checksums."""
    file = dataset / known.path
    if (status := lstat_regular(dataset, known.path)) is None:
        raise UserError(f"{file} is missing. {RESTORE_HINT}")
    check_equal(file, "bytes", status.st_size, known.bytes)
    found = sha256(file)
    if found != known.sha256:
        raise UserError(
            f"{file}: checksum {found[:8]}… is not the manifest's {known.sha256[:8]}…: "
            f"the file changed after it was written. {RESTORE_HINT}"
        )
    if isinstance(known, Shard) and footer_sha256(file) != known.footer_sha256:
        raise UserError(f"{file}: the checksum of its footer is not the manifest's. Run jobs.preprocess again.")


@contextmanager
def _opened(file: Path, bytes_: int) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose pages unpack to what its footer says. Raises UserError, also for what the block cannot read."""
    try:
        with local_file(file) as local, parquet_file(local) as parquet:
            check_footer(parquet.metadata, file, bytes_)
            check_pages(local, parquet.metadata)
            yield parquet
    except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
        raise UserError(f"{file}: cannot be read ({one_line(error)}). {cure_of(error, RESTORE_HINT)}") from None


def _check_rows(dataset: Dataset, shard: Shard, sizes: dict[str, int | None]) -> None:
    """A shard's columns, rows and labels. `sizes`: of its ids' tables, by column."""
    file = dataset.path / shard.path
    with _opened(file, shard.bytes) as parquet:
        if different := _kinds(parquet.schema_arrow) ^ _kinds(dataset.columns):
            raise UserError(f"{file}: column {printable(min(different)[0])} differs from the schema. {RESTORE_HINT}")
        check_row_groups(parquet.metadata, file, shard)
        observed, totals = dict.fromkeys(shard.observed, 0), dict.fromkeys(shard.observed, 0.0)
        weights, weighted = dict.fromkeys(shard.weights, 0.0), dict.fromkeys(shard.weights, 0.0)
        for batch in parquet.iter_batches(BATCH, columns=[*(f"label.{task}" for task in observed), "weight", *sizes]):
            weight = batch["weight"].cast(pa.float64())
            for task in observed:
                label = batch[f"label.{task}"].cast(pa.float64())
                observed[task] += len(label) - label.null_count
                totals[task] += pc.sum(label).as_py() or 0.0
                if task in weights:
                    weights[task] += pc.sum(weight.filter(label.is_valid())).as_py() or 0.0
                    weighted[task] += pc.sum(pc.multiply(label, weight)).as_py() or 0.0
            for name, size in sizes.items():
                check_ids(file, name, batch[name], size)
    for task, count in observed.items():
        check_equal(file, f"observed labels of {task}", count, shard.observed[task])
        check_equal(file, f"sum of labels of {task}", totals[task], shard.positives[task])
    for task, weight in weights.items():
        check_equal(file, f"weights of labels of {task}", weight, shard.weights[task])
        check_equal(file, f"weighted sum of labels of {task}", weighted[task], shard.weighted.get(task, math.nan))


def _kinds(columns: pa.Schema) -> set[tuple[str, str]]:
    """Names and types, without the names of list elements, which depend on the writer."""
    lists = {field.name for field in columns if pa.types.is_list(field.type)}
    return {(f.name, f"list of {f.type.value_type}" if f.name in lists else str(f.type)) for f in columns}


def _check_ids(dataset: Dataset) -> None:
    """Row ids are unique; those of very many rows are checked in parts."""
    shards = dataset.manifest.shards
    parts = max(1, math.ceil(sum(shard.rows for shard in shards) / IDS_AT_ONCE))
    for part in range(parts):
        read = each_of(dataset.path, lambda shard: [ids[ids % parts == part] for ids in _ids(dataset, shard)], shards)  # noqa: B023
        found = [ids for of_shard in read for ids in of_shard]
        ids = np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
        duplicates = ids[1:][ids[1:] == ids[:-1]]
        if len(duplicates):
            _raise_duplicate(dataset, int(duplicates[0]))


def _ids(dataset: Dataset, shard: Shard) -> Iterator[np.ndarray]:
    """A shard's row ids as they are read, a batch at a time. Raises UserError for a missing or negative one."""
    file, offset = dataset.path / shard.path, dataset.row_id_offset(shard)
    with _row_ids(dataset, shard) as parquet:
        for batch in parquet.iter_batches(BATCH, columns=["row_id"]):
            ids: pa.Array = batch["row_id"]
            values = ids.drop_null().to_numpy()
            if ids.null_count or (values < 0).any():
                raise UserError(f"{file}: a row_id is missing or negative. {RESTORE_HINT}")
            yield values + offset


@contextmanager
def _row_ids(dataset: Dataset, shard: Shard) -> Iterator[pq.ParquetFile]:
    """A shard whose column of row ids alone is read; from a store nothing else of it comes. Raises UserError."""
    file = dataset.path / shard.path
    if not on_store(file):
        with _opened(file, shard.bytes) as parquet:
            yield parquet
        return
    try:
        with open_shard(dataset, shard, ["row_id"]) as parquet:
            yield parquet
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}). {cure_of(error, RESTORE_HINT)}") from None


def _raise_duplicate(dataset: Dataset, row_id: int) -> None:
    """Raises UserError naming the files that hold a row id."""
    files = [s.path for s in dataset.manifest.shards for ids in _ids(dataset, s) for _ in ids[ids == row_id]]
    raise UserError(
        f"{dataset.path / files[1]}: row_id {row_id} is also in {files[0]}. Make source.row_id a unique column, "
        "and run jobs.preprocess again."
    )
