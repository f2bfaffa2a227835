"""The contender for side tables: the table as a dictionary in every worker, in which each row is looked up."""

import csv
import tempfile
from pathlib import Path
from typing import Any

import apache_beam as beam
import ingest_beam_rows as rows_
import ingest_workload as w
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

Row = dict[str, Any]
NOTHING: Row = dict.fromkeys([*w.ITEM_IDS, *w.ITEM_NUMBERS])


def fit(log: Path) -> tempfile.TemporaryDirectory[str]:
    """As ingest_beam_rows, with the columns of the table beside the others."""
    fitted = rows_.fit(log)
    with beam.Pipeline(FnApiRunner()) as pipeline:
        train = rows_._rows(pipeline, log) | "train" >> beam.Filter(lambda row: row["event_time"] < w.VALID_FROM)
        train = train | "look up" >> beam.ParDo(LookUp(log / w.ITEMS))
        rows_.fit_columns(train, w.ITEM_IDS, w.ITEM_NUMBERS, Path(fitted.name))
    return fitted


def encode(log: Path, out: Path, fitted: tempfile.TemporaryDirectory[str]) -> None:
    """Writes one file a split, as ingest_beam_rows."""
    with beam.Pipeline(FnApiRunner()) as pipeline:
        rows = rows_._rows(pipeline, log) | "look up" >> beam.ParDo(LookUp(log / w.ITEMS))
        for split, part in zip(w.SPLITS, rows | beam.Partition(rows_.BySplit(), len(w.SPLITS)), strict=True):
            encoded = part | f"encode {split}" >> beam.ParDo(Encode(Path(fitted.name)))
            _ = encoded | f"write {split}" >> beam.io.WriteToParquet(
                str(out / split / "part"), w.LOOKED_UP_COLUMNS, codec="zstd", file_name_suffix=".parquet", num_shards=1
            )


class LookUp(beam.DoFn):
    """A parsed row with the columns of its item."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self) -> None:
        """Reads the table once a worker."""
        with self.path.open() as file:
            self.items = {row[w.ITEM_KEY]: _parsed(row) for row in csv.DictReader(file)}

    def process(self, row: Row) -> list[Row]:
        return [row | self.items.get(row[w.ITEM_KEY], NOTHING)]


def _parsed(row: dict[str, str]) -> Row:
    price = float(row["price"]) if row["price"] else None
    return {"item_category": row["category"], "item_brand": row["brand"], "item_price": price}


class Encode(rows_.Encode):
    """A row with the columns of its item to a row of the dataset."""

    ids, numbers = [*w.IDS, *w.ITEM_IDS], [*w.NUMBERS, *w.ITEM_NUMBERS]
