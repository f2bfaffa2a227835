"""What one file of the log becomes on disk: shards per split with row groups of a set size, and dead letters."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.encoders import arrow_schema
from features.schema import Schema, Split
from pipeline.dataset import Shard, footer_sha256, sha256
from pipeline.ingest.source import Malformed


class SplitWriters:
    """Appends encoded rows to the shards of each split; `shards` describes what was written, once closed."""

    def __init__(self, staging: Path, attempt: str, schema: Schema, row_group: int, shard_rows: int) -> None:
        self.staging, self.attempt, self.schema = staging, attempt, schema
        self.row_group, self.shard_rows = row_group, shard_rows
        self.open: dict[Split, _ShardWriter] = {}
        self.shards: list[Shard] = []

    def write(self, split: Split, rows: pa.Table) -> None:
        """Appends rows; a shard that is full is closed and the next one begun."""
        while rows.num_rows:
            if split not in self.open:
                path = f"scratch/{split}-{self.attempt}-{len(self.shards):05d}-{len(self.open)}.parquet"
                self.open[split] = _ShardWriter(self.staging, path, split, self.schema, self.row_group)
            room = self.shard_rows - self.open[split].rows
            self.open[split].write(rows.slice(0, room))
            rows = rows.slice(room)
            if self.open[split].rows == self.shard_rows:
                self.shards.append(self.open.pop(split).close())

    def __enter__(self) -> "SplitWriters":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for writer in self.open.values():
            self.shards.append(writer.close())


class _ShardWriter:
    def __init__(self, staging: Path, path: str, split: Split, schema: Schema, row_group: int) -> None:
        self.staging, self.path, self.split, self.row_group = staging, path, split, row_group
        self.writer = pq.ParquetWriter(
            staging / path, arrow_schema(schema), compression="zstd", write_page_checksum=True, store_schema=True
        )
        self.pending: list[pa.Table] = []
        self.rows = 0
        self.row_groups: list[int] = []
        self.observed = dict.fromkeys(schema.tasks, 0)
        self.positives = dict.fromkeys(schema.tasks, 0.0)

    def write(self, rows: pa.Table) -> None:
        self.rows += rows.num_rows
        for task in self.observed:
            label = rows[f"label.{task}"]
            self.observed[task] += rows.num_rows - label.null_count
            self.positives[task] += pc.sum(label.cast(pa.float64())).as_py() or 0.0
        self.pending.append(rows)
        for group in self._whole_groups():
            self._flush(group)

    def _whole_groups(self) -> Iterator[pa.Table]:
        table = pa.concat_tables(self.pending)
        whole = table.num_rows - table.num_rows % self.row_group
        self.pending = [table.slice(whole)]
        return (table.slice(start, self.row_group) for start in range(0, whole, self.row_group))

    def _flush(self, group: pa.Table) -> None:
        self.writer.write_table(group, row_group_size=self.row_group)
        self.row_groups.append(group.num_rows)

    def close(self) -> Shard:
        rest = pa.concat_tables(self.pending)
        if rest.num_rows:
            self._flush(rest)
        self.writer.close()
        file = self.staging / self.path
        return Shard(
            path=self.path, split=self.split, rows=self.rows, bytes=file.stat().st_size, sha256=sha256(file),
            footer_sha256=footer_sha256(file), row_groups=self.row_groups, observed=self.observed, positives=self.positives,
        )  # fmt: skip


class LetterWriter:
    """Bad rows of one file as Parquet: file, line, reason, raw text. No bad rows, no file."""

    SCHEMA = pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])

    def __init__(self, staging: Path, path: str, file: str) -> None:
        self.path, self.file = staging / path, file
        self.writer: pq.ParquetWriter | None = None

    def write(self, letters: pl.DataFrame, malformed: Malformed) -> None:
        """Appends rows whose values are bad."""
        lines = [malformed.line(line) for line in letters["line"]]
        self._append(lines, letters["reason"].to_list(), letters["raw"].to_list())

    def write_malformed(self, malformed: Malformed) -> None:
        """Appends lines that are no rows."""
        self._append(malformed.numbers, malformed.reasons, malformed.texts)

    def _append(self, lines: list[int], reasons: list[str], raw: list[str]) -> None:
        if not lines:
            return
        if self.writer is None:
            self.path.parent.mkdir(exist_ok=True)
            self.writer = pq.ParquetWriter(self.path, self.SCHEMA, compression="zstd")
        self.writer.write_table(pa.table([[self.file] * len(lines), lines, reasons, raw], schema=self.SCHEMA))

    def __enter__(self) -> "LetterWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()
