"""What becomes of rows on disk: shards with row groups of a set size, and dead letters."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.hashing import hash_integers
from features.schema import Schema, Split
from pipeline.dataset import Letters, Shard, flushed, footer_sha256, sha256

LETTERS = pa.schema(
    [
        ("stream", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)


def order_of(order: str, seed: int, rows: pa.Table) -> np.ndarray | None:
    """The order of a shard's rows as indices, a function of the rows alone; None leaves it as it is."""
    row_id = rows["row_id"].to_numpy()
    if order == "shuffled":
        return np.lexsort((row_id, hash_integers(row_id, seed)))
    return np.lexsort((row_id, rows["event_time"].to_numpy())) if order == "time" else None


def write_shard(
    path: Path, staging: Path, split: Split, schema: Schema, rows: pa.Table, order: np.ndarray | None, row_group: int
) -> Shard:
    """Writes a shard and says what is in it."""
    if order is not None:  # a column at a time, so that not all of them are there twice
        taken = [rows[name].combine_chunks().take(pa.array(order)) for name in rows.column_names]
        rows = pa.Table.from_arrays(taken, schema=rows.schema)
    # No dictionaries: ids after zstd are no larger without, and written in half the time.
    with pq.ParquetWriter(
        path, rows.schema, compression="zstd", use_dictionary=False, write_page_checksum=True, store_schema=True
    ) as writer:
        writer.write_table(rows, row_group_size=row_group)
    flushed(path)
    groups = [row_group] * (rows.num_rows // row_group) + [rows.num_rows % row_group] * (rows.num_rows % row_group > 0)
    labels = {task: rows[f"label.{task}"] for task in schema.tasks}
    return Shard(
        path=str(path.relative_to(staging)), split=split, rows=rows.num_rows, bytes=path.stat().st_size, sha256=sha256(path),
        footer_sha256=footer_sha256(path), row_groups=groups,
        observed={task: rows.num_rows - label.null_count for task, label in labels.items()},
        positives={task: pc.sum(label.cast(pa.float64())).as_py() or 0.0 for task, label in labels.items()},
    )  # fmt: skip


def write_letters(staging: Path, name: str, stream: str, file: str, found: Sequence[tuple[str, int]]) -> Letters:
    """One file of a raw file's dead letters.

    Args:
        found: spilled letters, with what is added to their lines: those of earlier parts of the file.
    """
    parts = [pl.read_ipc(path).with_columns(pl.col("line") + before) for path, before in found]
    frame = pl.concat(parts).sort("line", maintain_order=True)
    path = staging / "dead_letters" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    table = frame.select(pl.lit(stream).alias("stream"), pl.lit(file).alias("file"), "line", "reason", "raw").to_arrow()
    pq.write_table(table.cast(LETTERS), path, compression="zstd")
    flushed(path)
    return Letters(
        path=str(path.relative_to(staging)),
        stream=stream,
        rows=frame.height,
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )
