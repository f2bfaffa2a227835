"""Rows of raw files as blocks of columns, each row with the number of its line, and the lines that are no rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from features.errors import UserError
from features.schema.source import Format, RawType
from pipeline.ingest.files import BLOCK_BYTES, BOM, Unit, codec_of, open_raw, open_text, readable
from pipeline.ingest.formats.text import LIST, TEXT, BadLine, CsvLines, JsonLines, Lines, parse, whole_lines

BLOCK_ROWS = 1 << 17  # of Parquet, where values that repeat take next to no bytes in the file


@dataclass(frozen=True)
class Block:
    """Rows of a unit that follow each other.

    Attributes:
        columns: the wanted ones, in order: text, or lists of text; those wanted as numbers also as float64 (float) or
            int64 (int, time), where all values of the block are such.
        row: rows of the unit before these.
        lines: computes the line of each row in the unit, from 1; in Parquet, and where values may hold line breaks, the row's
            number in the file, from 1, where a header counts and blank lines do not.
        bad: lines of this block that are no rows, numbered in the same way.
    """

    columns: pa.Table
    row: int
    lines: Callable[[], np.ndarray]
    bad: list[BadLine] = field(default_factory=list)


def _unheard(_read: int) -> None:
    """Where nobody watches the progress."""


class Reader:
    """Reads a unit block by block: iterate over it once.

    Attributes:
        lines: those that the unit had so far, the header and blank ones among them. By as many, lines of the file's
            next unit have higher numbers than `Block.lines` says. Parquet has none: its rows are numbered in the file.
    """

    def __init__(
        self,
        unit: Unit,
        format: Format,
        names: Sequence[str] | None,
        types: Mapping[str, RawType],
        lists: Mapping[str, str] | None = None,
        note: Callable[[int], object] = _unheard,
    ) -> None:
        """Opens nothing yet.

        Args:
            names: of the file's columns, as `check_columns` gave them.
            types: the wanted columns in the order in which a block has them.
            lists: those that may hold JSON arrays, each with what separates items where they are text.
            note: is told how many of the unit's bytes have been read.
        """
        self.unit, self.format, self.names, self.types = unit, format, list(names or []), dict(types)
        self.lists, self.note = lists or {}, note
        self.path = unit.file.path
        self.lines = 0

    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order.

        Raises:
            UserError: the file breaks off or is not what its name says, or a column has a type that has no use.
        """
        if self.format.format == "parquet":
            return self._parquet()
        return self._multiline() if self._is_multiline else self._lines()

    @property
    def _is_multiline(self) -> bool:
        return self.format.format == "csv" and self.format.multiline

    @property
    def _has_header(self) -> bool:
        return self.format.format == "csv" and self.format.columns is None and self.unit.start == 0

    def _lines(self) -> Iterator[Block]:
        is_json = self.format.format == "jsonl"
        parser: CsvLines | JsonLines = (
            JsonLines(self.types, self.lists) if is_json else CsvLines(self.format, self.names, self.types)
        )
        row, header = 0, self._has_header
        for data in self._bytes():
            if header:
                data, header = self._after_header(data)
            found = parse(data, parser)
            first, rows = self.lines + 1, found.columns.num_rows
            bad = [replace(line, line=first + line.line) for line in found.bad]
            self.lines += found.count
            yield Block(found.columns, row, partial(_numbers, found, first), bad)
            row += rows

    def _after_header(self, data: bytes) -> tuple[bytes, bool]:
        """What follows the first line that is not blank, and whether that is still to come."""
        filled = data.lstrip(b"\r\n")
        rest = filled.partition(b"\n")[2]
        self.lines += data.count(b"\n") - rest.count(b"\n")
        return rest, not filled

    def _bytes(self) -> Iterator[bytes]:
        """Whole lines of the unit, without a byte order mark."""
        unit, packed = self.unit, codec_of(self.path) is not None
        stop, first = unit.file.size if unit.stop is None else unit.stop, unit.start == 0
        with (
            readable(self.path, to_its_end=True),
            open_text(self.path, cache="readahead" if packed else "none") as (stream, raw),
        ):
            for data in whole_lines(stream, 0, None) if packed else whole_lines(raw, unit.start, stop):
                yield data.removeprefix(BOM) if first else data
                first = False
                self.note(min(raw.tell(), stop) - unit.start)

    def _multiline(self) -> Iterator[Block]:
        malformed, row = Malformed(int(self._has_header)), 0
        with readable(self.path, to_its_end=True), open_text(self.path) as (stream, raw):
            for batch in self._open_multiline(stream, malformed):
                table = pa.table(batch)
                yield Block(table, row, partial(malformed.lines, row, table.num_rows), malformed.take())
                row += table.num_rows
                self.lines = malformed.header_lines + row + len(malformed.numbers)
                self.note(raw.tell())

    def _open_multiline(self, stream: pa.NativeFile, malformed: "Malformed") -> pcsv.CSVStreamingReader:
        return pcsv.open_csv(
            stream,
            pcsv.ReadOptions(
                column_names=self.names,
                skip_rows_after_names=malformed.header_lines,
                block_size=BLOCK_BYTES,
                use_threads=False,
            ),
            pcsv.ParseOptions(
                delimiter=self.format.delimiter,
                quote_char=self.format.quote or False,
                newlines_in_values=True,
                invalid_row_handler=malformed.add,
            ),
            pcsv.ConvertOptions(
                column_types=dict.fromkeys(self.types, TEXT),
                include_columns=list(self.types),
                strings_can_be_null=False,
            ),
        )

    def _parquet(self) -> Iterator[Block]:
        unit, row = self.unit, 0
        with readable(self.path), open_raw(self.path) as raw:
            file = pq.ParquetFile(raw, pre_buffer=True)
            stop = file.num_row_groups if unit.stop is None else unit.stop
            groups = range(unit.start, stop)
            footers = [file.metadata.row_group(i) for i in groups]
            rows, size = sum(g.num_rows for g in footers), sum(g.total_byte_size for g in footers)
            batch_rows = max(1, min(BLOCK_ROWS, rows * BLOCK_BYTES // max(size, 1)))
            for batch in file.iter_batches(batch_rows, list(groups), list(self.types), use_threads=False):
                columns = {c: self._plain(batch[c], c) for c in self.types}
                first = unit.first_row + row + 1
                yield Block(pa.table(columns), row, partial(np.arange, first, first + batch.num_rows))
                row += batch.num_rows
                self.note(unit.file.size * row // file.metadata.num_rows)

    def _plain(self, values: pa.Array, column: str) -> pa.Array:
        try:
            return plain(values, self.types[column], self.format)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"{self.path}: column {column} is {values.type}, which cannot be read as text or numbers: "
                f"{str(error).splitlines()[0]}. Write it as another type."
            ) from None


def _numbers(lines: Lines, first: int) -> np.ndarray:
    return np.delete(np.arange(first, first + lines.count), lines.skipped)


class Malformed:
    """Rows of a multiline file that have another number of columns, in numbers as if every row were one line.

    Attributes:
        header_lines: 1 or 0.
        numbers: of the malformed rows, from 1, the header counted.
    """

    def __init__(self, header_lines: int) -> None:
        self.header_lines = header_lines
        self.numbers: list[int] = []
        self._new: list[BadLine] = []

    def add(self, row: pcsv.InvalidRow) -> str:
        """Notes a row and lets the reader go on."""
        reason = f"{row.actual_columns} columns instead of {row.expected_columns} (rows are counted here, not lines)"
        self.numbers.append(row.number)
        self._new.append(BadLine(row.number, reason, row.text))
        return "skip"

    def take(self) -> list[BadLine]:
        """The rows that were added since the last call."""
        taken, self._new = self._new, []
        return taken

    def lines(self, row: int, rows: int) -> np.ndarray:
        """The numbers of `rows` good rows, the first of which came out as number `row` (from 0)."""
        good = np.arange(row, row + rows) + 1 + self.header_lines
        # A good row comes after the k-th bad one where that has fewer than its number of good ones before it.
        good_before = np.array(self.numbers, np.int64) - np.arange(len(self.numbers))
        return good + np.searchsorted(good_before, good, side="right")


def plain(values: pa.Array, wanted: RawType, format: Format) -> pa.Array:
    """A column of a Parquet file as text, numbers or lists of text; times as whole seconds since 1970 UTC.

    Wanted as a number it is float64 or, for int and time, int64, or text where a value is none of these. NaN is missing.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: its type cannot be this, or its bytes are no UTF-8.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return plain(values.dictionary_decode(), wanted, format)
    if pa.types.is_floating(kind):  # many writers know no other missing number
        values = pc.if_else(pc.is_nan(values), None, values)
    if wanted == "string":
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return values.cast(LIST if any(check(kind) for check in lists) else TEXT)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = _seconds(values, format.timezone)
    elif pa.types.is_boolean(kind):
        values = values.cast(pa.int8())
    elif kind == pa.float16():
        values = values.cast(pa.float32())
    return _as_numbers(values, pa.float64() if wanted == "float" else pa.int64())


def _as_numbers(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Text stays text, and so becomes a column with a number that is not of the kind, or not finite."""
    is_float = pa.types.is_floating(values.type)
    if not (is_float or pa.types.is_integer(values.type) or pa.types.is_decimal(values.type)):
        return values.cast(TEXT)
    if is_float and not pc.all(pc.is_finite(values), min_count=0).as_py():
        return values.cast(TEXT)
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        return values.cast(TEXT)


def _seconds(values: pa.Array, timezone: str) -> pa.Array:
    """Whole seconds since 1970 UTC; as text where the clocks of the zone never showed one of the times, which stays one."""
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("s"))
    if values.type.tz is not None:
        return _whole_seconds(values)
    # At the end of summer time an hour comes twice, at its beginning one is left out.
    localized = partial(pc.assume_timezone, values, timezone, ambiguous="earliest")
    try:
        return _whole_seconds(localized(nonexistent="raise"))
    except pa.ArrowInvalid:
        before, after = localized(nonexistent="earliest"), localized(nonexistent="latest")
        return pc.if_else(pc.equal(before, after), _whole_seconds(after).cast(TEXT), values.cast(TEXT))


def _whole_seconds(values: pa.Array) -> pa.Array:
    """Timestamps as seconds since 1970 UTC, rounded down."""
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]
    ticks = values.cast(pa.int64())
    whole = pc.divide(ticks, per_second)  # towards zero
    return pc.subtract(whole, pc.less(ticks, pc.multiply(whole, per_second)).cast(pa.int64()))
