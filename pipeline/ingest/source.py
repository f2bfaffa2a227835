"""Raw files: which there are, what their columns are, and their rows as blocks of text columns."""

import csv
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from features.errors import UserError
from features.raw import clean, first_outcomes
from features.schema import Schema, Source
from pipeline.ingest.progress import Share

BLOCK_BYTES = 16 << 20


def find(folder: str, pattern: str) -> list[str]:
    """Files below `folder` that match, in name order. Raises UserError where there are none."""
    if Path(pattern).is_absolute():
        raise UserError(
            f"{pattern}: source.files is a pattern below the input folder. Set input=FOLDER to where it lies."
        )
    files = sorted(str(path) for path in Path(folder).glob(pattern))
    if not files:
        raise UserError(f"{Path(folder) / pattern}: no such file. Set input=FOLDER, or source.files in the schema.")
    return files


@dataclass
class Malformed:
    """Lines of a file that do not have its number of columns: their numbers from 1, the header's included, and text.

    Blank lines are not counted, and a row whose quoted text goes over several lines counts as one.
    """

    header_lines: int = 1
    numbers: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, row: pc.InvalidRow) -> str:
        """Notes a row and lets the reader go on."""
        self.numbers.append(row.number)
        self.texts.append(row.text)
        self.reasons.append(f"{row.actual_columns} columns instead of {row.expected_columns}")
        return "skip"

    def line(self, index: int) -> int:
        """The line of the row that came out as number `index` (from 0)."""
        first = number = index + 1 + self.header_lines
        while (shifted := first + bisect_right(self.numbers, number)) != number:
            number = shifted
        return number


def open_csv(
    file: pa.NativeFile, path: str, source: Source, columns: list[str], handler: Callable
) -> pc.CSVStreamingReader:
    """A reader of a CSV file (plain, gz, bz2, zst by its name) that gives the columns as text.

    Raises:
        UserError: it is empty or not what its name says.
    """
    try:
        return pc.open_csv(
            pa.CompressedInputStream(file, codec) if (codec := _codec(path)) else file,
            pc.ReadOptions(column_names=source.columns, block_size=BLOCK_BYTES, use_threads=False),
            # Without newlines_in_values a quoted line break stops the reader or not, as the block's end happens to fall.
            pc.ParseOptions(delimiter=source.delimiter, newlines_in_values=True, invalid_row_handler=handler),
            pc.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.large_string()),
                include_columns=columns,
                strings_can_be_null=False,
            ),
        )
    except (KeyError, pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None


def _codec(path: str) -> str | None:
    try:
        return pa.Codec.detect(path).name
    except (ValueError, TypeError):  # a name it does not know; a name without one
        return None


def check_columns(path: str, schema: Schema) -> None:
    """Raises UserError unless the file can be opened and has every column that the schema uses."""
    if schema.source.columns is not None:
        found = schema.source.columns
    else:
        try:
            with pa.input_stream(path, compression="detect") as stream:
                line = stream.read(1 << 16).split(b"\n", 1)[0].decode(errors="replace").strip("\ufeff\r")
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None
        found = next(csv.reader([line], delimiter=schema.source.delimiter), [])
    if missing := [c for c in schema.raw_columns if c not in found]:
        raise UserError(
            f"{path}: column {missing[0]} is missing, the file has {', '.join(found)}. "
            "Mend the schema, or name the columns in source.columns."
        )


def blocks(path: str, schema: Schema, malformed: Malformed, share: Share) -> Iterator[pl.DataFrame]:
    """The file's rows as frames of text columns, a block of about 16 MB at a time.

    Args:
        malformed: takes the lines that have another number of columns.
        share: is told how much of the file has been read.

    Raises:
        UserError: the file breaks off or is not the format it claims to be.
    """
    with pa.OSFile(path) as file:
        reader = open_csv(file, path, schema.source, schema.raw_columns, malformed.add)
        try:
            for batch in reader:
                yield pl.from_arrow(pa.table(batch))  # type: ignore[misc]
                share.note(file.tell())
        except (pa.ArrowInvalid, OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read to its end: {_one_line(error)}. Fetch it again.") from None


def load_outcomes(folder: str, schema: Schema) -> dict[str, pl.DataFrame]:
    """The outcome streams of a schema, each held in memory: first event of each key."""
    outcomes = {}
    for name, outcome in schema.source.outcomes.items():
        columns = [outcome.key, *outcome.columns]
        parts = []
        for path in find(folder, outcome.files):
            bad, header = Malformed(), schema.source.model_copy(update={"columns": None})
            with pa.OSFile(path) as file:
                reader = open_csv(file, path, header, columns, bad.add)
                try:
                    events: pl.DataFrame = pl.from_arrow(reader.read_all())  # type: ignore[assignment]
                except (pa.ArrowInvalid, OSError, EOFError) as error:
                    raise UserError(f"{path}: cannot be read to its end: {_one_line(error)}. Fetch it again.") from None
            if bad.numbers:
                raise UserError(f"{path}, line {bad.numbers[0]}: {bad.reasons[0]}. Mend or remove the line.")
            try:
                parts.append(first_outcomes(clean(schema, events), name, outcome.key, outcome.columns))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        outcomes[name] = pl.concat(parts).unique("key", keep="first", maintain_order=True)
    return outcomes


def save_outcomes(outcomes: dict[str, pl.DataFrame], folder: Path) -> None:
    """Keeps the joined streams as Parquet, so that workers load them instead of reading the raw files again."""
    folder.mkdir()
    for name, frame in outcomes.items():
        pq.write_table(frame.to_arrow(), folder / f"{name}.parquet")


def read_outcomes(folder: Path) -> dict[str, pl.DataFrame]:
    """What `save_outcomes` kept."""
    return {path.stem: pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
