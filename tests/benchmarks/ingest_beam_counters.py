"""The contender for counters: a GroupByKey by impression for clicks, and one a counter, in whose groups a loop adds up."""

import json
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import ingest_beam_rows as rows_
import ingest_workload as w
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

Row = dict[str, Any]
Event = tuple[
    int, int, int, float
]  # impression, its time, when it was known whether it was clicked, and whether it was


def fit(log: Path) -> tempfile.TemporaryDirectory[str]:
    """As ingest_beam_rows, with the mean of clicks over the train split in clicks.json."""
    fitted = rows_.fit(log)
    with beam.Pipeline(FnApiRunner()) as pipeline:
        train = rows_._rows(pipeline, log) | "train" >> beam.Filter(lambda row: row["event_time"] < w.VALID_FROM)
        mean = train | "clicks" >> beam.Map(lambda row: row["click"]) | beam.combiners.Mean.Globally()
        _ = mean | "saved" >> beam.Map(rows_._save, Path(fitted.name, "clicks.json"))
    return fitted


def encode(log: Path, out: Path, fitted: tempfile.TemporaryDirectory[str]) -> None:
    """Writes one file a split, as ingest_beam_rows, with the counters beside the features."""
    mean = json.loads(Path(fitted.name, "clicks.json").read_text())
    with beam.Pipeline(FnApiRunner()) as pipeline:
        clicks = pipeline | "clicks" >> beam.io.ReadFromText(str(log / w.CLICKS), skip_header_lines=1)
        shown = rows_._rows(pipeline, log) | "by impression" >> beam.Map(lambda row: (row["impression_id"], row))
        parts = {"row": shown, "click": clicks | "click times" >> beam.Map(_click)}
        joined = parts | "join" >> beam.CoGroupByKey() | "clicked" >> beam.Map(_clicked)
        parts = {"row": joined | "again by impression" >> beam.Map(lambda row: (row["impression_id"], row))}
        for name, counter in w.COUNTERS.items():
            events = joined | f"{name} events" >> beam.Map(_event, counter["by"]) | f"{name} group" >> beam.GroupByKey()
            parts[name] = events | f"{name} count" >> beam.FlatMap(_counted, counter, mean)
        whole = parts | "counters of" >> beam.CoGroupByKey() | "row of" >> beam.Map(_with_counters)
        for split, part in zip(w.SPLITS, whole | beam.Partition(rows_.BySplit(), len(w.SPLITS)), strict=True):
            encoded = part | f"encode {split}" >> beam.ParDo(Encode(Path(fitted.name)))
            _ = encoded | f"write {split}" >> beam.io.WriteToParquet(
                str(out / split / "part"), w.COUNTED_COLUMNS, codec="zstd", file_name_suffix=".parquet", num_shards=1
            )


def _click(line: str) -> tuple[int, int]:
    impression, time, _ = line.split(",")
    return int(impression), int(time)


def _clicked(joined: tuple[int, dict[str, list[Any]]]) -> Row:
    """The row of an impression, and when it was known whether it was clicked."""
    row, times = joined[1]["row"][0], joined[1]["click"]
    known = min(times) if times else row["event_time"] + w.WINDOW
    return {**row, "click": int(bool(times)), "known": known}


def _event(row: Row, key: str) -> tuple[str, Event]:
    return row[key], (row["impression_id"], row["event_time"], row["known"], row["click"])


def _counted(group: tuple[str, Iterable[Event]], counter: dict[str, Any], mean: float) -> Iterator[tuple[int, float]]:
    """The counter at each impression of a key, in order of their times, from what was known before it."""
    events, rows_only, smoothing = list(group[1]), counter["take"] == "count", counter.get("smoothing", 0)
    coming = deque(sorted((shown if rows_only else known, value) for _, shown, known, value in events))
    inside: deque[tuple[int, float]] = deque()
    weight, total, last = 0.0, 0.0, 0
    for time, impression in sorted((shown, impression) for impression, shown, *_ in events):
        while coming and coming[0][0] < time:
            known, value = coming.popleft()
            share = _share(counter, known - last)
            weight, total, last = weight * share + 1, total * share + value, known
            inside.append((known, value))
        while "window" in counter and inside and time - inside[0][0] > counter["window"]:
            weight, total = weight - 1, total - inside.popleft()[1]
        share = _share(counter, time - last)
        yield impression, weight if rows_only else (total * share + smoothing * mean) / (weight * share + smoothing)


def _share(counter: dict[str, Any], seconds: int) -> float:
    """What decay leaves of a weight."""
    return 2 ** (-seconds / counter["decay"]) if "decay" in counter else 1.0


def _with_counters(joined: tuple[int, dict[str, list[Any]]]) -> Row:
    found = joined[1]
    return {**found["row"][0], **{name: found[name][0] for name in w.COUNTERS}}


class Encode(rows_.Encode):
    """A row with counters to a row of the dataset."""

    def process(self, row: Row) -> Iterator[Row]:
        for encoded in super().process(row):
            yield encoded | {name: row[name] for name in w.COUNTERS}
