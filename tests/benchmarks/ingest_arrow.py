"""The floor: pyarrow alone, no Beam, a block of 16 MB at a time."""

import math
from collections.abc import Iterator
from pathlib import Path

import ingest_workload as w
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

BLOCK_BYTES = 16 << 20
Moments = dict[str, tuple[float, float]]  # mean and standard deviation by column
Fitted = tuple[dict[str, pa.Array], Moments]  # vocabularies by column: values in the order of their ids


def fit(log: Path) -> Fitted:
    """Vocabularies and moments."""
    counts: dict[str, list[pa.StructArray]] = {name: [] for name in w.IDS}
    sums = {name: np.zeros(3) for name in w.NUMBERS}
    for block in _blocks(log, ["event_time", *w.IDS, *w.NUMBERS]):
        train = block.filter(pc.less(block["event_time"], w.VALID_FROM))
        for name in w.IDS:
            counts[name].append(pc.value_counts(train[name]))
        for name in w.NUMBERS:
            x = np.log1p(train[name].drop_null().to_numpy())
            sums[name] += len(x), x.sum(), (x * x).sum()
    moments = {name: (float(s / n), math.sqrt(ss / n - (s / n) ** 2)) for name, (n, s, ss) in sums.items()}
    return {name: _vocabulary(parts) for name, parts in counts.items()}, moments


def _blocks(log: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    read = pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
    convert = pa.csv.ConvertOptions(
        column_types=w.TYPES, include_columns=columns, strings_can_be_null=True, null_values=[""]
    )
    for path in sorted(log.glob(w.IMPRESSIONS)):
        with pa.csv.open_csv(path, read, convert_options=convert) as blocks:
            yield from blocks


def _vocabulary(parts: list[pa.StructArray]) -> pa.Array:
    counts = pa.Table.from_batches([pa.RecordBatch.from_struct_array(part) for part in parts])
    counts = counts.filter(pc.is_valid(counts["values"]))
    counts = counts.group_by("values", use_threads=False).aggregate([("counts", "sum")])
    counts = counts.filter(pc.greater_equal(counts["counts_sum"], w.MIN_COUNT))
    return counts.sort_by([("counts_sum", "descending"), ("values", "ascending")])["values"].combine_chunks()


def encode(log: Path, out: Path, fitted: Fitted) -> None:
    """Writes one file a split."""
    splits = [_SplitFile(out / split) for split in w.SPLITS]
    for block in _blocks(log, list(w.TYPES)):
        rows = _encoded(block, *fitted)
        split = np.searchsorted([w.VALID_FROM, w.TEST_FROM], rows["event_time"].to_numpy(), side="right")
        for number in np.unique(split):
            splits[number].write(rows.filter(pa.array(split == number)))
    for writer in splits:
        writer.close()


def _encoded(block: pa.RecordBatch, vocabularies: dict[str, pa.Array], moments: Moments) -> pa.Table:
    columns = {}
    for name, (mean, std) in moments.items():
        x = np.log1p(pc.fill_null(block[name], math.expm1(mean)).to_numpy())
        columns[name] = pa.array(((x - mean) / std).astype(np.float32))
    for name, values in vocabularies.items():
        found = pc.fill_null(pc.index_in(block[name], values), -1).to_numpy()
        columns[name] = pc.if_else(block[name].is_valid(), pa.array(found.astype(np.int64) + w.UNKNOWN + 1), 0)
    columns["label.click"] = block["click"].cast(pa.float32())
    columns["weight"] = pa.array(np.ones(len(block), np.float32))
    return pa.table([*columns.values(), block["event_time"], block["impression_id"]], schema=w.COLUMNS)


class _SplitFile:
    """A Parquet file whose row groups are full, the last one aside."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        repeated = [*w.IDS, "label.click", "weight"]  # of the others a dictionary would be larger than the values
        self.writer = pq.ParquetWriter(
            folder / "part-0.parquet", w.COLUMNS, compression="zstd", use_dictionary=repeated
        )
        self.waiting = w.COLUMNS.empty_table()

    def write(self, rows: pa.Table) -> None:
        rows = pa.concat_tables([self.waiting, rows])
        full = len(rows) - len(rows) % w.ROW_GROUP
        if full:
            self.writer.write_table(rows.slice(0, full), w.ROW_GROUP)
        self.waiting = rows.slice(full)

    def close(self) -> None:
        if len(self.waiting):
            self.writer.write_table(self.waiting)
        self.writer.close()
