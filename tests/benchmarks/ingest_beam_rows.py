"""The contender that most Beam pipelines look like: a dictionary a row, a Count.PerElement a column, WriteToParquet."""

import csv
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import ingest_workload as w
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

Row = dict[str, Any]
CASTS: dict[str, Callable[[str], Any]] = {"int64": int, "double": float, "string": str}


def fit(log: Path) -> tempfile.TemporaryDirectory[str]:
    """Returns a folder with COLUMN.json: a vocabulary {value: id}, or a mean and a standard deviation."""
    fitted = tempfile.TemporaryDirectory()
    with beam.Pipeline(FnApiRunner()) as pipeline:
        train = _rows(pipeline, log) | "train" >> beam.Filter(lambda row: row["event_time"] < w.VALID_FROM)
        fit_columns(train, w.IDS, w.NUMBERS, Path(fitted.name))
    return fitted


def fit_columns(train: Any, ids: list[str], numbers: list[str], folder: Path) -> None:
    """Adds to a pipeline what counts these columns of parsed rows and saves what was fitted."""
    for name in [*ids, *numbers]:
        values = train | f"{name} values" >> beam.FlatMap(_known, name)
        if name in ids:
            found = values | f"{name} counts" >> beam.combiners.Count.PerElement()
            found = found | f"{name} listed" >> beam.combiners.ToList() | f"{name} ids" >> beam.Map(_vocabulary)
        else:
            found = values | f"{name} moments" >> beam.CombineGlobally(MeanAndDeviation())
        _ = found | f"{name} saved" >> beam.Map(_save, folder / f"{name}.json")


def encode(log: Path, out: Path, fitted: tempfile.TemporaryDirectory[str]) -> None:
    """Writes one file a split; WriteToParquet knows row groups by bytes only."""
    with beam.Pipeline(FnApiRunner()) as pipeline:
        rows = _rows(pipeline, log) | "split" >> beam.Partition(BySplit(), len(w.SPLITS))
        for split, part in zip(w.SPLITS, rows, strict=True):
            encoded = part | f"encode {split}" >> beam.ParDo(Encode(Path(fitted.name)))
            _ = encoded | f"write {split}" >> beam.io.WriteToParquet(
                str(out / split / "part"), w.COLUMNS, codec="zstd", file_name_suffix=".parquet", num_shards=1
            )


def _rows(pipeline: beam.Pipeline, log: Path) -> Any:
    lines = pipeline | beam.io.ReadFromText(str(log / w.IMPRESSIONS), skip_header_lines=1)
    return lines | "parse" >> beam.Map(_parse)


def _parse(line: str) -> Row:
    cells = next(csv.reader([line]))
    return {
        name: CASTS[str(kind)](cell) if cell else None
        for (name, kind), cell in zip(w.TYPES.items(), cells, strict=True)
    }


def _known(row: Row, name: str) -> Iterator[Any]:
    if row[name] is not None:
        yield row[name]


def _vocabulary(counts: list[tuple[str, int]]) -> dict[str, int]:
    kept = sorted((-count, value) for value, count in counts if count >= w.MIN_COUNT)
    return {value: number for number, (_, value) in enumerate(kept, w.UNKNOWN + 1)}


def _save(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content))


class BySplit(beam.PartitionFn):
    """A parsed row's split by its time, as an index into SPLITS."""

    def partition_for(self, element: Any, num_partitions: int, *args: Any, **kwargs: Any) -> int:
        return int(element["event_time"] >= w.VALID_FROM) + int(element["event_time"] >= w.TEST_FROM)


class MeanAndDeviation(beam.CombineFn):
    """Of log1p of the values, by count, sum and sum of squares."""

    def create_accumulator(self) -> tuple[int, float, float]:
        return 0, 0.0, 0.0

    def add_input(self, sums: tuple[int, float, float], value: float) -> tuple[int, float, float]:
        count, total, squares = sums
        x = math.log1p(value)
        return count + 1, total + x, squares + x * x

    def merge_accumulators(self, parts: Iterable[tuple[int, float, float]]) -> tuple[int, float, float]:
        count, total, squares = (sum(values) for values in zip(*parts, strict=True))
        return int(count), total, squares

    def extract_output(self, sums: tuple[int, float, float]) -> tuple[float, float]:
        count, total, squares = sums
        return total / count, math.sqrt(squares / count - (total / count) ** 2)


class Encode(beam.DoFn):
    """A parsed row to a row of the dataset."""

    ids, numbers = w.IDS, w.NUMBERS

    def __init__(self, fitted: Path) -> None:
        self.fitted = fitted

    def setup(self) -> None:
        """Reads the vocabularies once a worker."""
        self.column = {
            name: json.loads((self.fitted / f"{name}.json").read_text()) for name in [*self.ids, *self.numbers]
        }

    def process(self, row: Row) -> Iterator[Row]:
        encoded: Row = {}
        for name in self.ids:
            encoded[name] = 0 if row[name] is None else self.column[name].get(row[name], w.UNKNOWN)
        for name in self.numbers:
            mean, std = self.column[name]
            encoded[name] = 0.0 if row[name] is None else (math.log1p(row[name]) - mean) / std
        encoded["label.click"], encoded["weight"] = float(row["click"]), 1.0
        encoded["event_time"], encoded["row_id"] = row["event_time"], row["impression_id"]
        yield encoded
