"""CSV and its like: a line a row, or values with line breaks, where a file is read in one piece."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from features.errors import UserError
from features.source import Format, RawType
from features.time_units import is_format
from pipeline.ingest.files import BLOCK_BYTES, BOM, RawFile, Unit, open_text, readable
from pipeline.ingest.formats.base import BadLine, Block, OnBytes, RawFormat, Wanted
from pipeline.ingest.formats.columns import TEXT
from pipeline.ingest.formats.text import (
    NOT_UTF8,
    SHOWN_BYTES,
    beginning_of,
    byte_ranges,
    first_line,
    head_of,
    header_too_long,
    is_utf8,
    line_blocks,
    too_long,
)

OPEN_QUOTE = (
    "a quote is not closed: set quote: null where quotes are plain characters, or multiline: true where values "
    "hold line breaks"
)
ROW_TOO_LONG = "straddl"  # of Arrow's message: it has no error class for a row that is longer than a block
LONE_RETURN = "a carriage return within the line: set multiline: true where values hold line breaks"


class Csv(RawFormat):
    """Text with a delimiter. Names of columns are in the header line, or given by the schema for files without one."""

    column_fix = "Fix the schema, or name the columns in source.columns."

    def column_names(self, file: RawFile) -> list[str] | None:
        """See RawFormat. Raises UserError for a file without a header line."""
        if self.options.columns:
            head_of(file)  # a file that cannot be opened is refused now, whoever names its columns
            return list(self.options.columns)
        return _header(file, self.options)

    def units(self, file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:
        """See RawFormat."""
        return byte_ranges(file, number, unit_bytes, whole or self.options.multiline)

    def read(self, unit: Unit, wanted: Wanted, on_bytes: OnBytes) -> Iterator[Block]:
        """See RawFormat. Lists are text."""
        has_header = self.options.columns is None and unit.start == 0
        if self.options.multiline:
            return _multiline_blocks(unit, self.options, wanted, has_header, on_bytes)
        parser = CsvLines(self.options, wanted.names or [], wanted.types)
        return line_blocks(unit, parser, has_header, self.options.max_line_bytes, on_bytes)


def _header(file: RawFile, options: Format) -> list[str]:
    """The names in a file's first line, or where lines are rows in the first that is not blank."""
    path, limit = file.path, options.max_line_bytes
    if options.multiline:  # a header, too, may hold line breaks within quotes
        head = head_of(file, limit + 1)
        lines = iter(io.StringIO(head.decode(errors="replace"), newline=""))
    else:
        head = first_line(file, limit)
        lines = iter([head.decode(errors="replace")] if head else [])
    try:
        names = next(csv.reader(lines, **_reader_options(options)), [])
    except csv.Error as error:
        raise UserError(f"{path}: its header line cannot be read: {error}. Fix it, or set source.columns.") from None
    if len(head) > limit and next(lines, None) is None:
        raise header_too_long(path, limit)
    if not names:
        raise UserError(f"{path}: is empty, where a header line should be. Remove it, or set source.columns.")
    return [name.strip() for name in names] if options.trim else names


def _reader_options(options: Format) -> dict[str, Any]:
    """Keyword arguments of Python's csv.reader."""
    quotes = {"quotechar": options.quote} if options.quote else {"quoting": csv.QUOTE_NONE}
    return {"delimiter": options.delimiter, **quotes}


class CsvLines:
    """CSV in which a line is a row: a quote that is left open ends with its line."""

    spaces = b"\r"

    def __init__(self, options: Format, names: Sequence[str], types: Mapping[str, RawType]) -> None:
        """`names` are the file's columns, `types` those that are wanted, in order."""
        self.options, self.names, self.columns = options, list(names), list(types)
        formatted = {c for c, unit in options.times.items() if is_format(unit)}  # 01022026 is no number there
        numeric = {c: t for c, t in types.items() if t != "string" and c not in formatted}
        self.numbers = {c: pa.float64() if t == "float" else pa.int64() for c, t in numeric.items()}
        if options.trim and any(_is_number(text) for text in options.missing):
            self.numbers = {}  # the reader would take " -1" for a number where "-1" is missing
        self.closed = _closed_quotes(options)

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """See LineParser. A column with another value than numbers is read as text from then on."""
        if _has_lone_return(data) or not self._ends_closed(data):
            return None
        try:
            table = self._read(data, self.numbers)
        except pa.ArrowInvalid:
            try:
                table = self._read(data, {})
            except pa.ArrowInvalid:
                return None
            if table.num_rows == rows:
                self.numbers = {c: t for c, t in self.numbers.items() if self._casts(table[c], t)}
        return table if table.num_rows == rows else None

    def faults(self, lines: Sequence[bytes]) -> dict[int, str]:
        """See LineParser."""
        found = {i: reason for i, line in enumerate(lines) if (reason := self._fault(line))}
        rest = [i for i in range(len(lines)) if i not in found and is_utf8(lines[i])]

        def add_fault(row: pcsv.InvalidRow) -> str:
            found[rest[row.number - 1]] = _columns_fault(row.actual_columns, row.expected_columns)
            return "skip"

        self._convert(b"".join(lines[i] + b"\n" for i in rest), {}, self.columns, add_fault)
        return found

    def _fault(self, line: bytes) -> str | None:
        """The reason why a line is not a row, but for the number of columns in UTF-8, which the reader counts."""
        if b"\r" in line.removesuffix(b"\r"):
            return LONE_RETURN
        if self.closed and not self.closed.fullmatch(line):
            return OPEN_QUOTE
        if is_utf8(line):
            return None
        try:
            values = next(csv.reader([line.decode(errors="surrogateescape")], **_reader_options(self.options)))
        except csv.Error:  # a value that is too long for it
            return NOT_UTF8
        if len(values) != len(self.names):
            return _columns_fault(len(values), len(self.names))
        wanted = "".join(value for name, value in zip(self.names, values, strict=True) if name in self.columns)
        return None if is_utf8(wanted.encode(errors="surrogateescape")) else NOT_UTF8

    def _ends_closed(self, data: bytes) -> bool:
        """Whether no quote is left open in the last line: one before it swallows lines, which shows in their number."""
        end = len(data)
        while end and data[end - 1] in b"\r\n":
            end -= 1
        return self.closed is None or bool(self.closed.fullmatch(data[data.rfind(b"\n", 0, end) + 1 : end]))

    def _read(self, data: bytes, numbers: Mapping[str, pa.DataType]) -> pa.Table:
        table = self._convert(data, numbers, self.columns)
        floats = [c for c, t in numbers.items() if t == pa.float64()]
        # So that messages show the text of the file.
        odd = [c for c in floats if not pc.all(pc.is_finite(table[c]), min_count=0).as_py()]
        if odd:
            again = self._convert(data, {}, odd)
            for column in odd:
                table = table.set_column(table.column_names.index(column), column, again[column])
        return table

    def _convert(
        self, data: bytes, numbers: Mapping[str, pa.DataType], columns: list[str], handler: Callable | None = None
    ) -> pa.Table:
        """The rows of `data`. Raises pa.ArrowInvalid."""
        wanted = {c: numbers.get(c, TEXT) for c in columns}
        if not data:
            return pa.table({c: pa.array([], kind) for c, kind in wanted.items()})
        # After a blank line a byte order mark is a character, as it is anywhere but at a file's beginning.
        data = b"\n" + data if data.startswith(BOM) else data
        return pcsv.read_csv(
            pa.BufferReader(data),
            pcsv.ReadOptions(column_names=self.names, use_threads=False, block_size=len(data) + 1),
            pcsv.ParseOptions(
                delimiter=self.options.delimiter, quote_char=self.options.quote or False, invalid_row_handler=handler
            ),
            pcsv.ConvertOptions(
                column_types=wanted,
                include_columns=columns,
                null_values=self.options.missing,
                strings_can_be_null=False,
            ),
        )

    def _casts(self, texts: pa.ChunkedArray, kind: pa.DataType) -> bool:
        known = texts.filter(pc.invert(pc.is_in(texts, pa.array(self.options.missing, TEXT))))
        try:
            pc.cast(known, kind)
        except pa.ArrowInvalid:
            return False
        return True


def _closed_quotes(options: Format) -> re.Pattern[bytes] | None:
    """Matches the lines whose quotes are all closed; a quote counts at the beginning of a value only."""
    if options.quote is None:
        return None
    quote, delimiter = re.escape(options.quote).encode(), re.escape(options.delimiter).encode()
    quoted = b"Q(?:[^Q]|QQ)*Q(?!Q)[^D]*"
    value = b"(?:%s|[^QD][^D]*|)" % quoted
    return re.compile((b"%s(?:D%s)*" % (value, value)).replace(b"Q", quote).replace(b"D", delimiter))


def _columns_fault(found: int, expected: int) -> str:
    return f"{found} columns instead of {expected}"


def _multiline_blocks(
    unit: Unit,
    options: Format,
    wanted: Wanted,
    has_header: bool,
    on_bytes: OnBytes,
) -> Iterator[Block]:
    """The blocks of a file whose values may hold line breaks."""
    malformed, limit = MalformedRows(int(has_header)), options.max_line_bytes
    row, good, counted = 0, 0, 0
    with readable(unit.file.path, to_its_end=True), open_text(unit.file) as (stream, raw):
        for batch in _multiline_batches(unit.file.path, stream, options, wanted, malformed):
            table = pa.table(batch)
            numbers = partial(malformed.line_numbers, row, table.num_rows)
            bad, lines = malformed.take(), malformed.header_lines + row + table.num_rows + len(malformed.numbers)
            row += table.num_rows
            sizes = sum(
                (pc.binary_length(c).to_numpy() for c in table.itercolumns()), np.zeros(table.num_rows, np.int64)
            )
            if (long := sizes > limit).any():
                found, where = table.filter(pa.array(long)), numbers()
                texts = (beginning_of(_joined(found, i), size) for i, size in enumerate(sizes[long]))
                reasons = (too_long("row", size, limit) for size in sizes[long])
                bad += map(BadLine, where[long].tolist(), reasons, texts)
                bad.sort(key=lambda each: each.line)
                table, numbers = table.filter(pa.array(~long)), partial(np.compress, ~long, where)
            yield Block(table, good, numbers, bad, lines - counted)
            good, counted = good + table.num_rows, lines
            on_bytes(raw.tell())


def _joined(rows: pa.Table, row: int) -> bytes:
    """The beginning of a row: its values up to SHOWN_BYTES."""
    found = b""
    for column in rows.itercolumns():
        if len(found) < SHOWN_BYTES:
            value = column.slice(row, 1).cast(pa.binary())
            found += b" " * bool(found) + pc.binary_slice(value, 0, SHOWN_BYTES)[0].as_py()
    return found


def _multiline_batches(
    path: str, stream: pa.NativeFile, options: Format, wanted: Wanted, malformed: "MalformedRows"
) -> Iterator[pa.RecordBatch]:
    """The rows of a file as Arrow reads them. Raises UserError for one that is longer than a block."""
    try:
        yield from pcsv.open_csv(
            stream,
            pcsv.ReadOptions(
                column_names=list(wanted.names or []),
                skip_rows_after_names=malformed.header_lines,
                block_size=BLOCK_BYTES,
                use_threads=False,
            ),
            pcsv.ParseOptions(
                delimiter=options.delimiter,
                quote_char=options.quote or False,
                newlines_in_values=True,
                invalid_row_handler=malformed.add,
            ),
            pcsv.ConvertOptions(
                column_types=dict.fromkeys(wanted.types, TEXT),
                include_columns=list(wanted.types),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        if ROW_TOO_LONG not in str(error):
            raise
        raise UserError(
            f"{path}: a row is longer than {BLOCK_BYTES:,} bytes, as if a quote were not closed. Fix it, or set quote: null "
            "where quotes are plain characters."
        ) from None


class MalformedRows:
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
        """Records a row and makes the reader skip it."""
        reason = f"{row.actual_columns} columns instead of {row.expected_columns} (rows are counted here, not lines)"
        self.numbers.append(row.number)
        self._new.append(BadLine(row.number, reason, row.text))
        return "skip"

    def take(self) -> list[BadLine]:
        """The rows that were added since the last call."""
        taken, self._new = self._new, []
        return taken

    def line_numbers(self, row: int, rows: int) -> np.ndarray:
        """The numbers of `rows` good rows, the first of which came out as number `row` (from 0)."""
        good = np.arange(row, row + rows) + 1 + self.header_lines
        # A good row comes after the k-th bad one where that has fewer than its number of good ones before it.
        good_before = np.array(self.numbers, np.int64) - np.arange(len(self.numbers))
        return good + np.searchsorted(good_before, good, side="right")


def _has_lone_return(data: bytes) -> bool:
    return b"\r" in data and data.count(b"\r") != data.count(b"\r\n")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
