"""Step `write`: shards, their rows in order, with row groups of a set size."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.fit.encoders import arrow_schema
from features.fit.split_counts import FeatureCounts, count_features, summed
from features.hashing import hash_integers
from features.schema.kept import TEXT
from features.schema.schema import Schema, Split
from pipeline.dataset.entries import Shard
from pipeline.ingest import shuffle
from pipeline.ingest.messages import Piece, WriteReport, WriteWork
from pipeline.ingest.state import Job, Order
from pipeline.ingest.steps.encode import rows_of_split
from pipeline.ingest.written import written_whole


def write(job: Job, work: WriteWork) -> WriteReport:
    """Writes a shard, a slice of it in memory at a time."""
    counts: list[dict[str, FeatureCounts]] = []
    if job.order == "input":  # rows that stay in their order are encoded only now
        tables = (_encoded(job, work.split, piece, counts) for pieces in work.slices for piece in pieces)
    else:
        slices = (
            pa.concat_tables(shuffle.read_each([p.path for p in pieces], [p.start for p in pieces]))
            for pieces in work.slices
        )
        tables = (ordered(rows, job.order, job.seed) for rows in slices)
    path = job.unfinished_path("shard", work.path)
    shard = write_shard(path, job.staging, work.split, job.schema, tables, job.rows_per_row_group)
    return WriteReport(shard, counts=summed(counts))


def _encoded(job: Job, split: Split, piece: Piece, counts: list[dict[str, FeatureCounts]]) -> pa.Table:
    """Encodes a piece, and adds the counts of its features."""
    rows = rows_of_split(shuffle.read(piece.path), split).slice(piece.start, piece.rows)
    encoded = job.encoders.encode(rows)
    if job.counts_split(split):
        counts.append(count_features(job.encoders, rows, encoded))
    return encoded


def ordered(rows: pa.Table, order: Order, seed: int) -> pa.Table:
    """Rows in their order, which is a function of the rows alone."""
    row_id = rows["row_id"].to_numpy()
    index = np.lexsort((row_id, hash_integers(row_id, seed) if order == "shuffled" else rows["event_time"].to_numpy()))
    columns = [rows[name].combine_chunks().take(pa.array(index)) for name in rows.column_names]
    return pa.Table.from_arrays(columns, schema=rows.schema)


def write_shard(
    path: Path, staging: Path, split: Split, schema: Schema, tables: Iterable[pa.Table], row_group: int
) -> Shard:
    """Writes rows that come table by table; returns the shard's entry for the manifest."""
    rows, observed, positives = 0, dict.fromkeys(schema.tasks, 0), dict.fromkeys(schema.tasks, 0.0)
    weighing = schema.tasks if schema.weight else ()
    weights, weighted = dict.fromkeys(weighing, 0.0), dict.fromkeys(weighing, 0.0)
    # No dictionaries but of kept texts: ids after zstd are no larger without, and written in half the time. Larger pages decode
    # no faster; of 13 us that a reader takes for a wide row, zstd 3 saves 1, and lz4 3, for a third more bytes
    # (tests/benchmarks/loading.py).
    texts = [column for column, kind in schema.kept.items() if kind == TEXT]
    with (
        written_whole(path) as (target, written),
        pq.ParquetWriter(
            target,
            arrow_schema(schema),
            compression="zstd",
            use_dictionary=texts,
            write_page_checksum=True,
            store_schema=True,
        ) as writer,
    ):
        for table in whole_groups(tables, row_group):
            writer.write_table(table, row_group_size=row_group)
            rows += table.num_rows
            for task in schema.tasks:
                label = table[f"label.{task}"]
                observed[task] += table.num_rows - label.null_count
                positives[task] += pc.sum(label.cast(pa.float64())).as_py() or 0.0
            for task in weighing:
                label, weight = table[f"label.{task}"].cast(pa.float64()), table["weight"].cast(pa.float64())
                weights[task] += pc.sum(weight.filter(label.is_valid())).as_py() or 0.0
                weighted[task] += pc.sum(pc.multiply(label, weight)).as_py() or 0.0
    groups = [row_group] * (rows // row_group) + [rows % row_group] * (rows % row_group > 0)
    return Shard(
        path=str(path.relative_to(staging)), split=split, rows=rows, bytes=written.bytes, sha256=written.sha256,
        footer_sha256=written.footer_sha256, row_groups=groups, observed=observed, positives=positives,
        weights=weights, weighted=weighted,
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
