"""What becomes of rows on disk: shards with row groups of a set size, and dead letters."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.fit.encoders import arrow_schema
from features.hashing import hash_integers
from features.schema.schema import Schema, Split
from pipeline.dataset.manifest import DeadLetterFile, Shard, footer_sha256
from pipeline.storage.files import sha256
from pipeline.storage.local import fsync

Order = Literal["shuffled", "time", "input"]
DEAD_LETTER_COLUMNS = pa.schema(
    [
        ("stream", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)


def ordered(rows: pa.Table, order: Order, seed: int) -> pa.Table:
    """Rows in their order, which is a function of the rows alone."""
    row_id = rows["row_id"].to_numpy()
    index = np.lexsort((row_id, hash_integers(row_id, seed) if order == "shuffled" else rows["event_time"].to_numpy()))
    columns = [rows[name].combine_chunks().take(pa.array(index)) for name in rows.column_names]
    return pa.Table.from_arrays(columns, schema=rows.schema)


def write_shard(
    path: Path, staging: Path, split: Split, schema: Schema, tables: Iterable[pa.Table], row_group: int
) -> Shard:
    """Writes rows that come table by table, and says what is in the shard."""
    rows, observed, positives = 0, dict.fromkeys(schema.tasks, 0), dict.fromkeys(schema.tasks, 0.0)
    # No dictionaries: ids after zstd are no larger without, and written in half the time.
    with pq.ParquetWriter(
        path,
        arrow_schema(schema),
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
        store_schema=True,
    ) as writer:
        for table in whole_groups(tables, row_group):
            writer.write_table(table, row_group_size=row_group)
            rows += table.num_rows
            for task in schema.tasks:
                label = table[f"label.{task}"]
                observed[task] += table.num_rows - label.null_count
                positives[task] += pc.sum(label.cast(pa.float64())).as_py() or 0.0
    fsync(path)
    groups = [row_group] * (rows // row_group) + [rows % row_group] * (rows % row_group > 0)
    return Shard(
        path=str(path.relative_to(staging)), split=split, rows=rows, bytes=path.stat().st_size, sha256=sha256(path),
        footer_sha256=footer_sha256(path), row_groups=groups, observed=observed, positives=positives,
    )  # fmt: skip


def whole_groups(tables: Iterable[pa.Table], row_group: int) -> Iterator[pa.Table]:
    """The same rows in tables of whole row groups, but for the last one."""
    rest: list[pa.Table] = []
    for table in tables:
        joined = pa.concat_tables([*rest, table])
        whole = joined.num_rows - joined.num_rows % row_group
        rest = [joined.slice(whole)]
        if whole:
            yield joined.slice(0, whole)
    if rest and rest[0].num_rows:
        yield rest[0]


def write_dead_letters(
    staging: Path, name: str, stream: str, file: str, found: Sequence[tuple[str, int]]
) -> DeadLetterFile:
    """One file of a raw file's dead letters.

    Args:
        found: spilled dead_letters, with what is added to their lines: those of earlier parts of the file.
    """
    parts = [pl.read_ipc(path).with_columns(pl.col("line") + before) for path, before in found]
    frame = pl.concat(parts).sort("line", maintain_order=True)
    path = staging / "dead_letters" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    table = frame.select(pl.lit(stream).alias("stream"), pl.lit(file).alias("file"), "line", "reason", "raw").to_arrow()
    pq.write_table(table.cast(DEAD_LETTER_COLUMNS), path, compression="zstd")
    fsync(path)
    return DeadLetterFile(
        path=str(path.relative_to(staging)),
        stream=stream,
        rows=frame.height,
        bytes=path.stat().st_size,
        sha256=sha256(path),
    )
