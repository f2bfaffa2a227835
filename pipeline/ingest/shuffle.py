"""Rows on their way between steps: Arrow files that are mapped instead of read, and rows dealt to buckets by a hash."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.hashing import hash_integers, hash_strings

KEY_SEED = 11  # of the buckets of a join
PLACE = "__place"  # of a row in its part: what is sent to buckets comes back in another order


def write(path: Path, tables: Sequence[pa.Table]) -> str:
    """Writes tables of one schema, each a batch that `read` can take alone; returns the path."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, tables[0].schema) as writer:
        for table in tables:
            columns = [c.combine_chunks() if c.num_chunks != 1 else c.chunk(0) for c in table.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table.schema))
    return str(path)


def read(path: str, batch: int = 0, mapped: bool = True) -> pa.Table:
    """One of the tables, mapped into memory; a small one of many had better be read."""
    with pa.memory_map(path) if mapped else pa.OSFile(path) as file:
        return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(batch)])


def bucket_of(keys: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each key, text or integer; of a missing one, any."""
    if pa.types.is_integer(keys.type):
        hashes = hash_integers(keys.fill_null(0).to_numpy(), KEY_SEED)
    elif pa.types.is_dictionary(keys.type):
        return (
            bucket_of(keys.dictionary, buckets)[keys.indices.fill_null(0).to_numpy()]
            if len(keys.dictionary)
            else np.zeros(len(keys), int)
        )
    else:
        hashes = hash_strings(keys, KEY_SEED)
    return share_of(hashes, buckets)


def share_of(hashes: np.ndarray, shares: int) -> np.ndarray:
    """Which of equal shares of the range of 64-bit hashes each lies in: ascending with the hash."""
    return ((hashes >> np.uint64(32)) * np.uint64(shares) >> np.uint64(32)).astype(np.int64)


def partition(table: pa.Table, bucket_B: np.ndarray, buckets: int) -> list[pa.Table]:
    """The rows of each bucket, in the order they had."""
    if buckets == 1:
        return [table]
    ordered = table.take(pa.array(np.argsort(bucket_B, kind="stable")))
    ends = np.cumsum(np.bincount(bucket_B, minlength=buckets))
    return [ordered.slice(stop - size, size) for stop, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def gather(paths: Sequence[str], part: int, rows: int) -> pa.Table:
    """What buckets sent back to a part, in the order of its rows."""
    found = pa.concat_tables([read(path, part, mapped=False) for path in paths], promote_options="permissive")
    order = np.empty(rows, np.int64)
    order[found[PLACE].to_numpy()] = np.arange(rows)
    return found.drop_columns([PLACE]).combine_chunks().take(pa.array(order))
