"""Rows on their way between steps: Arrow files, mapped or read, and rows partitioned into buckets by a hash.

On a store a file is one object, see pipeline.ingest.batch_objects.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.ingest import batch_objects
from pipeline.storage.store_path import StorePath, place, remove_all

POSITION = "__position"  # of a row in its part: buckets have the rows of a part in another order


def write(path: Path, tables: Sequence[pa.Table]) -> str:
    """Writes tables of one schema, each a batch that `read` can take alone; returns the path."""
    if isinstance(path, StorePath):
        batch_objects.write(path, [_batch(table) for table in tables])
        return str(path)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, tables[0].schema) as writer:
        for table in tables:
            writer.write_batch(_batch(table))
    return str(path)


def _batch(table: pa.Table) -> pa.RecordBatch:
    columns = [c.combine_chunks() if c.num_chunks != 1 else c.chunk(0) for c in table.columns]
    return pa.RecordBatch.from_arrays(columns, schema=table.schema)


def read(path: str, batch: int = 0, mapped: bool = True) -> pa.Table:
    """One of the tables, mapped into memory; reading is faster for a small one of many."""
    if isinstance(stored := place(path), StorePath):
        return batch_objects.read(stored) if mapped and not batch else batch_objects.read_each([stored], [batch])[0]
    with pa.memory_map(path) if mapped else pa.OSFile(path) as file:
        return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(batch)])


def read_each(paths: Sequence[str], batches: Sequence[int], mapped: bool = False) -> list[pa.Table]:
    """One of the tables of each file; those on a store at the same time."""
    stored = [place(path) for path in paths[:1]]
    if stored and isinstance(stored[0], StorePath):
        return batch_objects.read_each([place(path) for path in paths], batches)  # type: ignore[misc]
    return [read(path, batch, mapped) for path, batch in zip(paths, batches, strict=True)]


def remove(paths: Sequence[Path]) -> None:
    """Deletes files that no later step reads; those that are gone already are nobody's loss."""
    if paths and isinstance(paths[0], StorePath):
        remove_all([path for path in paths if isinstance(path, StorePath)])
    else:
        for path in paths:
            path.unlink(missing_ok=True)


def partition(table: pa.Table, bucket_B: np.ndarray, buckets: int) -> list[pa.Table]:
    """The rows of each bucket, in their order."""
    if buckets == 1:
        return [table]
    ordered = table.take(pa.array(np.argsort(bucket_B, kind="stable")))
    ends = np.cumsum(np.bincount(bucket_B, minlength=buckets))
    return [ordered.slice(stop - size, size) for stop, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def read_bucket(paths: Sequence[str], bucket: int) -> tuple[pl.DataFrame, list[int]]:
    """The rows that all parts scattered to a bucket, in the order of the parts, and how many each."""
    tables = read_each(paths, [bucket] * len(paths))
    return pl.from_arrow(pa.concat_tables(tables)), [table.num_rows for table in tables]  # type: ignore[return-value]


def write_batches(path: Path, frame: pl.DataFrame, sizes: Sequence[int]) -> str:
    """Writes the rows of a bucket, a batch for each part that they came from; returns the path."""
    table, ends = frame.rechunk().to_arrow(), np.cumsum(sizes)
    return write(path, [table.slice(stop - size, size) for stop, size in zip(ends, sizes, strict=True)])


def gather(paths: Sequence[str], part: int, rows: int) -> pa.Table:
    """The batches for a part from the files of all buckets, in the order of its rows."""
    found = pa.concat_tables(read_each(paths, [part] * len(paths)), promote_options="permissive")
    order = np.empty(rows, np.int64)
    order[found[POSITION].to_numpy()] = np.arange(rows)
    return found.drop_columns([POSITION]).combine_chunks().take(pa.array(order))
