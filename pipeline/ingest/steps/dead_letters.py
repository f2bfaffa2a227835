"""Dead letters: spilled by the steps that find bad rows, and written as one Parquet file for each raw file in the end."""

import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from features.kinds.times import IMPLAUSIBLE
from features.parse import raw
from pipeline.dataset.entries import DeadLetterFile
from pipeline.ingest.messages import DeadLetters
from pipeline.ingest.state import Job
from pipeline.ingest.written import written_whole
from pipeline.storage.store_path import on_store, place

LONG_LINE = re.compile(r"(line|row) of \d+ bytes( is longer than .*)")
EXAMPLES = 20  # reasons of which the first row is kept
IMPLAUSIBLE_TIME = rf"^(.*): (-?\d+) {IMPLAUSIBLE} in seconds since 1970(.*)$"
REASON_CHARACTERS = 500  # of the first one, which is on the terminal if there are too many
COLUMNS = pa.schema(
    [
        ("stream", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)


def spill(job: Job, found: Sequence[pl.DataFrame]) -> DeadLetters:
    """Writes frames of dead letters to a temporary file."""
    frame = pl.concat(found) if found else raw.dead_letters()
    if not frame.height:
        return DeadLetters()
    path = job.temporary_path("dead_letters")
    with written_whole(path, durable=False) as (target, _):
        frame.write_ipc(target)
    reasons: Counter[str] = Counter()
    examples: dict[str, tuple[int, str]] = {}
    for line, reason in frame.select("line", "reason").sort("line", maintain_order=True).iter_rows():
        reasons[kind := _kind(reason)] += 1
        if kind not in examples and len(examples) < EXAMPLES:
            examples[kind] = line, _shortened(reason)
    first = frame.row(int(frame["line"].arg_min() or 0), named=True)
    return DeadLetters(str(path), dict(reasons), first["line"], _shortened(first["reason"]), examples=examples)


def implausible_times(found: Sequence[DeadLetters], reason: str) -> str:
    """How the implausible times among spilled dead letters range, with their likely unit unless `reason` has it.

    Empty without any. Reads the files of all: for the message of a job that stops.
    """
    ranges: dict[tuple[str, str], tuple[int, int, int]] = {}  # by column and likely unit: rows, first and last
    for path in (each.path for each in found if each.path):
        part = pl.read_ipc(_source(path), columns=["reason"])["reason"].str.extract_groups(IMPLAUSIBLE_TIME)
        times = part.struct.unnest().drop_nulls().with_columns(pl.col("2").cast(pl.Int64))
        grouped = times.group_by("1", "3").agg(
            pl.len(), pl.col("2").min().alias("first"), pl.col("2").max().alias("last")
        )
        for name, likely, rows, first, last in grouped.iter_rows():
            before = ranges.get((name, likely), (0, first, last))
            ranges[name, likely] = (before[0] + rows, min(before[1], first), max(before[2], last))
    if not ranges:
        return ""
    (name, likely), (rows, first, last) = max(ranges.items(), key=lambda item: (item[1], item[0]))
    said = "" if reason.endswith(likely) else likely
    return f" In {rows:,} rows {name} is from {first} to {last}{said}."


def _kind(reason: str) -> str:
    """A reason without the value that caused it, so that equal causes are counted together."""
    if found := LONG_LINE.fullmatch(reason):
        return f"{found[1]}{found[2]}"
    name, _, rest = reason.partition(": ")
    if name == "not JSON":
        return name
    return reason if not rest or rest.startswith(("set ", "write ", "missing")) else f"{name}: wrong value"


def _shortened(reason: str) -> str:
    """A reason without the middle of a long value in it."""
    half = REASON_CHARACTERS // 2
    return reason if len(reason) <= REASON_CHARACTERS else f"{reason[:half]} … {reason[-half:]}"


def write_file(staging: Path, name: str, stream: str, file: str, found: Sequence[tuple[str, int]]) -> DeadLetterFile:
    """Writes the dead letters of a raw file.

    Args:
        found: spilled files, each with the number of the raw file's lines before those it counts.
    """
    parts = [pl.read_ipc(_source(path)).with_columns(pl.col("line") + before) for path, before in found]
    frame = pl.concat(parts).sort("line", maintain_order=True)
    path = staging / "dead_letters" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    table = frame.select(pl.lit(stream).alias("stream"), pl.lit(file).alias("file"), "line", "reason", "raw").to_arrow()
    with written_whole(path) as (target, written):
        pq.write_table(table.cast(COLUMNS), target, compression="zstd")
    return DeadLetterFile(
        path=str(path.relative_to(staging)),
        stream=stream,
        rows=frame.height,
        bytes=written.bytes,
        sha256=written.sha256,
    )


def _source(path: str) -> str | io.BytesIO:
    """What polars reads: a path that it maps, or the content of an object."""
    return io.BytesIO(spilled.read_bytes()) if on_store(spilled := place(path)) else path
