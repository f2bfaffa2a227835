"""Lines of text files: bytes cut at line ends, read as CSV or JSON, and which of the lines are no rows."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from features.schema.source import Format, RawType
from pipeline.ingest.files import BLOCK_BYTES, BOM, csv_options, one_line

NEWLINE = ord("\n")
CACHED_BYTES = 1 << 18
TAIL_BYTES = 1 << 16  # read at a time for the end of a range's last line
OPEN_QUOTE = (
    "a quote is not closed: set quote: null where quotes are plain characters, or multiline: true where values "
    "hold line breaks"
)
LONE_RETURN = "a carriage return within the line: set multiline: true where values hold line breaks"
NOT_UTF8 = "not UTF-8"
TEXT, LIST = pa.string(), pa.list_(pa.string())


@dataclass(frozen=True)
class BadLine:
    """A line that is no row: its number, what is wrong with it, and its text."""

    line: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Lines:
    """What lines of text hold.

    Attributes:
        columns: a row for each line that is one.
        count: lines, whatever they hold.
        skipped: indices of the lines that are no rows, be they blank or bad, in ascending order.
        bad: the bad ones, numbered from 0.
    """

    columns: pa.Table
    count: int
    skipped: np.ndarray
    bad: list[BadLine]


class LineParser(Protocol):
    """A format in which a line is a row.

    Attributes:
        spaces: what a blank line may consist of.
    """

    spaces: bytes

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """The rows of `data`, whole lines; None where they are not `rows` good ones."""

    def faults(self, lines: Sequence[bytes]) -> dict[int, str]:
        """What is wrong with those of the lines, none of them blank, that are no rows."""


def whole_lines(stream: BinaryIO | pa.NativeFile, start: int, stop: int | None) -> Iterator[bytes]:
    """The lines that begin in [start, stop), about BLOCK_BYTES of them at a time, each with its line end."""
    position, within_line, rest = max(start - 1, 0), start > 0, b""
    if position:
        stream.seek(position)
    while stop is None or position < stop:
        data = stream.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position))
        if not data:
            break
        position += len(data)
        if position == stop and not data.endswith(b"\n"):
            data += _rest_of_line(stream)
        if within_line:  # which began before this range
            _, found, data = data.partition(b"\n")
            within_line = not found
            if within_line:
                continue
        data = rest + data
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if end:
            yield data[:end]
    if rest:
        yield rest + b"\n"


def _rest_of_line(stream: BinaryIO | pa.NativeFile) -> bytes:
    """What there is to the line's end, which a file's last line may lack."""
    found = b""
    while data := stream.read(TAIL_BYTES):
        end = data.find(b"\n") + 1
        if end:
            return found + data[:end]
        found += data
    return found + b"\n"


def parse(data: bytes, parser: LineParser) -> Lines:
    """Reads whole lines; bad ones among them do not touch the others."""
    count, blank = _count_lines(data)
    table = parser.table(data, count - len(blank))
    if table is not None:
        return Lines(table, count, blank, [])
    lines = data.split(b"\n")[:-1]
    filled = [i for i, line in enumerate(lines) if line.strip(parser.spaces)]
    faults = {filled[i]: reason for i, reason in parser.faults([lines[i] for i in filled]).items()}
    good = [lines[i] + b"\n" for i in filled if i not in faults]
    table = parser.table(b"".join(good), len(good))
    if table is None:
        raise RuntimeError("lines that are rows each by itself are none together")
    bad = [BadLine(i, faults[i], lines[i].rstrip(b"\r").decode(errors="replace")) for i in sorted(faults)]
    skipped = np.setdiff1d(np.arange(count), np.array([i for i in filled if i not in faults], np.int64))
    return Lines(table, count, skipped, bad)


def _count_lines(data: bytes) -> tuple[int, np.ndarray]:
    """How many lines there are, and the indices of the empty ones, which most data do not have."""
    count, is_empty = 0, data.startswith((b"\n", b"\r\n")) or (b"\r" in data and b"\n\r\n" in data)
    whole = np.frombuffer(data, np.uint8)
    for start in range(0, len(whole), CACHED_BYTES):
        ends = whole[start : start + CACHED_BYTES + 1] == NEWLINE
        count += int(np.count_nonzero(ends[:CACHED_BYTES]))
        is_empty = is_empty or bool((ends[1:] & ends[:-1]).any())
    if not is_empty:
        return count, np.empty(0, np.int64)
    return count, np.array([i for i, line in enumerate(data.split(b"\n")[:-1]) if line in (b"", b"\r")], np.int64)


class CsvLines:
    """CSV in which a line is a row, whatever quotes it holds."""

    spaces = b"\r"

    def __init__(self, format: Format, names: Sequence[str], types: Mapping[str, RawType]) -> None:
        """`names` are the file's columns, `types` those that are wanted, in order."""
        self.format, self.names, self.columns = format, list(names), list(types)
        self.numbers = {c: pa.float64() if t == "float" else pa.int64() for c, t in types.items() if t != "string"}
        if format.trim and any(_is_number(text) for text in format.missing):
            self.numbers = {}  # the reader would take " -1" for a number where "-1" is missing
        self.closed = _closed_quotes(format)

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """See LineParser. A column that is no number here is read as text from now on."""
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
        rest = [i for i in range(len(lines)) if i not in found and _is_utf8(lines[i])]

        def note(row: pcsv.InvalidRow) -> str:
            found[rest[row.number - 1]] = _columns_fault(row.actual_columns, row.expected_columns)
            return "skip"

        self._convert(b"".join(lines[i] + b"\n" for i in rest), {}, self.columns, note)
        return found

    def _fault(self, line: bytes) -> str | None:
        """What is wrong with a line, but for the number of columns in UTF-8, which the reader counts."""
        if b"\r" in line.removesuffix(b"\r"):
            return LONE_RETURN
        if self.closed and not self.closed.fullmatch(line):
            return OPEN_QUOTE
        if _is_utf8(line):
            return None
        try:
            values = next(csv.reader([line.decode(errors="surrogateescape")], **csv_options(self.format)))
        except csv.Error:  # longer than a value may be there
            return NOT_UTF8
        if len(values) != len(self.names):
            return _columns_fault(len(values), len(self.names))
        wanted = "".join(value for name, value in zip(self.names, values, strict=True) if name in self.columns)
        return None if _is_utf8(wanted.encode(errors="surrogateescape")) else NOT_UTF8

    def _ends_closed(self, data: bytes) -> bool:
        """Whether no quote is left open in the last line: one further up swallows lines, which shows in their number."""
        end = len(data)
        while end and data[end - 1] in b"\r\n":
            end -= 1
        return self.closed is None or bool(self.closed.fullmatch(data[data.rfind(b"\n", 0, end) + 1 : end]))

    def _read(self, data: bytes, numbers: Mapping[str, pa.DataType]) -> pa.Table:
        table = self._convert(data, numbers, self.columns)
        floats = [c for c, t in numbers.items() if t == pa.float64()]
        # So that what is shown as wrong is what stands in the file.
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
                delimiter=self.format.delimiter, quote_char=self.format.quote or False, invalid_row_handler=handler
            ),
            pcsv.ConvertOptions(
                column_types=wanted,
                include_columns=columns,
                null_values=self.format.missing,
                strings_can_be_null=False,
            ),
        )

    def _casts(self, texts: pa.ChunkedArray, kind: pa.DataType) -> bool:
        known = texts.filter(pc.invert(pc.is_in(texts, pa.array(self.format.missing, TEXT))))
        try:
            pc.cast(known, kind)
        except pa.ArrowInvalid:
            return False
        return True


def _closed_quotes(format: Format) -> re.Pattern[bytes] | None:
    """Matches the lines whose quotes are all closed; a quote counts at the beginning of a value only."""
    if format.quote is None:
        return None
    quote, delimiter = re.escape(format.quote).encode(), re.escape(format.delimiter).encode()
    quoted = b"Q(?:[^Q]|QQ)*Q(?!Q)[^D]*"
    value = b"(?:%s|[^QD][^D]*|)" % quoted
    return re.compile((b"%s(?:D%s)*" % (value, value)).replace(b"Q", quote).replace(b"D", delimiter))


def _columns_fault(found: int, expected: int) -> str:
    return f"{found} columns instead of {expected}"


class JsonLines:
    """JSON lines: every line an object."""

    spaces = b" \t\r"

    def __init__(self, types: Mapping[str, RawType], lists: Mapping[str, str]) -> None:
        """`lists` are the columns that may hold arrays, with the separator of items where they hold text."""
        self.columns, self.lists = list(types), {c: s for c, s in lists.items() if c in types}
        self.as_text = False  # whether a value of `lists` was no array

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """See LineParser."""
        frame = self._read(data)
        if frame is None or frame.height != rows:
            return None
        if self.as_text:
            frame = frame.with_columns(_lists_of_text(frame[c], separator) for c, separator in self.lists.items())
        plain = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        kinds = {c: LIST if frame.schema[c] == pl.List else TEXT for c in self.columns}
        return plain.cast(pa.schema(kinds.items()))

    def faults(self, lines: Sequence[bytes]) -> dict[int, str]:
        """See LineParser."""
        found = {i: reason for i, line in enumerate(lines) if (reason := _json_fault(line))}
        return found | self._refused(lines, [i for i in range(len(lines)) if i not in found])

    def _refused(self, lines: Sequence[bytes], among: Sequence[int]) -> dict[int, str]:
        """Those of the lines at the indices `among` that the reader refuses, found by halving them."""
        frame = self._read(b"".join(lines[i] + b"\n" for i in among))
        if frame is not None and frame.height == len(among):
            return {}
        if len(among) == 1:
            return {among[0]: "not JSON that can be read"}
        middle = len(among) // 2
        return self._refused(lines, among[:middle]) | self._refused(lines, among[middle:])

    def _read(self, data: bytes) -> pl.DataFrame | None:
        for as_text in [True] if self.as_text or not self.lists else [False, True]:
            kind = pl.String() if as_text else pl.List(pl.String)
            schema = {c: kind if c in self.lists else pl.String() for c in self.columns}
            try:
                frame = pl.read_ndjson(data, schema=schema)
            except pl.exceptions.PolarsError:
                continue
            self.as_text = as_text
            return frame
        return None


def _json_fault(line: bytes) -> str | None:
    try:
        return None if isinstance(json.loads(line), dict) else "no JSON object"
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError) as error:
        return f"not JSON: {one_line(error)}"


def _lists_of_text(texts: pl.Series, separator: str) -> pl.Series:
    """JSON arrays that were read as text, as lists, and so the texts beside them; where there are no arrays, the text."""
    array = texts.str.starts_with("[").fill_null(False)
    if not array.any():
        return texts
    column, kind = pl.col(texts.name), pl.List(pl.String)
    items = pl.when(array).then(column).str.json_decode(kind)
    try:
        return texts.to_frame().select(pl.when(array).then(items).otherwise(column.str.split(separator))).to_series()
    except pl.exceptions.PolarsError:  # a text that only begins as an array does
        return pl.Series(texts.name, [None if t is None else _items(t, separator) for t in texts], kind)


def _items(text: str, separator: str) -> Sequence[str | None]:
    if text.startswith("["):
        try:
            return pl.Series([text]).str.json_decode(pl.List(pl.String))[0].to_list()
        except pl.exceptions.PolarsError:
            pass
    return text.split(separator)


def _has_lone_return(data: bytes) -> bool:
    return b"\r" in data and data.count(b"\r") != data.count(b"\r\n")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
