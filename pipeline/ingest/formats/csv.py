"""CSV and its like: a line a row, or values with line breaks, where a file is read in one piece."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from features.errors import UserError
from features.source import Format
from pipeline.ingest.files import RawFile, Unit
from pipeline.ingest.formats.base import BadLine, Block, OnBytes, RawFormat, Wanted
from pipeline.ingest.formats.csv_quotes import LONE_RETURN, OPEN_QUOTE, Quotes
from pipeline.ingest.formats.csv_reader import CsvReader, reader_options
from pipeline.ingest.formats.csv_rows import RowExtents, Scan, TextLines, scan_rows
from pipeline.ingest.formats.csv_spans import SpanFinder
from pipeline.ingest.formats.lines import line_blocks
from pipeline.ingest.formats.text import (
    WholeLines,
    byte_ranges,
    first_line,
    head_of,
    header_too_long,
    lines_between,
    row_text,
)
from pipeline.ingest.formats.text_blocks import Parsed, text_blocks


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
        options, names = self.options, wanted.names or []
        limit = options.max_line_bytes
        has_header = options.columns is None and unit.start == 0
        reader = CsvReader(options, names, wanted.types)
        if options.quote is None:
            return line_blocks(unit, CsvLines(reader, None), has_header, limit, on_bytes)
        extents = RowExtents(options, len(names))
        if options.multiline:
            return text_blocks(unit, CsvRows(reader, extents), has_header, limit, on_bytes)
        spans = SpanFinder(extents, _before(unit, options) if unit.start else None)
        return line_blocks(unit, CsvLines(reader, extents.quotes), has_header, limit, on_bytes, spans)


def _before(unit: Unit, options: Format) -> Callable[[], bytes]:
    """Reads the lines before a unit, of more than a row may have the last ones. A header among them leaves no quote open."""

    def read() -> bytes:
        start = max(unit.start - options.max_line_bytes - 1, 0)
        found = lines_between(unit.file, start, unit.start, options.max_line_bytes)
        return found.data.split(b"\n", found.long[-1].index + 1)[-1] if found.long else found.data

    return read


def _header(file: RawFile, options: Format) -> list[str]:
    """The names in a file's first row that is not blank."""
    head = _header_row(file, options).decode(errors="replace")
    try:
        names = next(csv.reader([head], **reader_options(options)), []) if head else []
    except csv.Error as error:
        raise _header_fault(file.path, str(error)) from None
    if not names:
        raise UserError(f"{file.path}: is empty, where a header line should be. Remove it, or set source.columns.")
    return [name.strip() for name in names] if options.trim else names


def _header_row(file: RawFile, options: Format) -> bytes:
    """A file's first row that is not blank, without its line end; empty where there is none."""
    limit = options.max_line_bytes
    if not (options.multiline and options.quote):
        line = first_line(file, limit)
        if options.quote and Quotes(options).line_fault(line) == OPEN_QUOTE:
            raise _header_fault(file.path, OPEN_QUOTE)
        return line
    head = head_of(file, limit + 2).lstrip(b"\r\n")
    data = head if head.endswith(b"\n") else head + b"\n"
    found = Quotes(options).row(data, 0, len(data))
    if found.fault not in (None, OPEN_QUOTE) or (found.fault and len(head) <= limit):
        raise _header_fault(file.path, "a quote is not closed" if found.fault == OPEN_QUOTE else str(found.fault))
    if found.end - 1 > limit:
        raise header_too_long(file.path, limit)
    return data[: found.end - 1].removesuffix(b"\r")


def _header_fault(path: str, reason: str) -> UserError:
    return UserError(f"{path}: its header line cannot be read: {reason}. Fix it, or set source.columns.")


class CsvLines:
    """CSV in which a line is a row (a LineParser): a quote that is left open ends with its line."""

    spaces = b"\r"

    def __init__(self, reader: CsvReader, quotes: Quotes | None) -> None:
        self.reader, self.quotes = reader, quotes

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """See LineParser."""
        if _has_lone_return(data):
            return None
        if self.quotes and not self.quotes.regular(data) and self._quote_faults(data):
            return None
        return self.reader.table(data, rows)  # a quote that is open at a line's end swallows lines: rows are fewer then

    def faults(self, lines: Sequence[bytes]) -> dict[int, str]:
        """See LineParser."""
        found = self._quote_faults(b"".join(line + b"\n" for line in lines))
        found |= {i: LONE_RETURN for i, line in enumerate(lines) if b"\r" in line.removesuffix(b"\r")}
        rest = [i for i in range(len(lines)) if i not in found]
        return found | {rest[i]: reason for i, reason in self.reader.faults([lines[i] for i in rest]).items()}

    def _quote_faults(self, data: bytes) -> dict[int, str]:
        """The reasons why lines are not rows for their quotes, by index."""
        if self.quotes is None:
            return {}
        lines = TextLines(data, [], complete=True)
        starts = lines.starts.tolist()
        found = {
            i: self.quotes.row(data, starts[i], starts[i + 1]).fault
            for i in self.quotes.irregular_lines(data, lines.ends)
        }
        return {i: reason for i, reason in found.items() if reason}


class CsvRows:
    """CSV whose values may hold line breaks (a RowParser)."""

    def __init__(self, reader: CsvReader, extents: RowExtents) -> None:
        self.reader, self.extents = reader, extents

    def header_lines(self, lines: WholeLines, complete: bool) -> tuple[int, int]:
        """See RowParser: the first row that is not blank."""
        filled = lines.data.lstrip(b"\r\n")
        blank = lines.data.count(b"\n", 0, len(lines.data) - len(filled))
        extent = self.extents.at(TextLines(filled, [], complete), 0) if filled else None
        return blank, extent.lines if extent else 0

    def parse(self, lines: WholeLines, following: WholeLines | None) -> Parsed:
        """See RowParser. `following` has no lines: the end of a file, which is read in one piece."""
        text = TextLines(lines.data, [each.index for each in lines.long], following is not None)
        scan = scan_rows(self.extents, text)
        table, faults = self.reader.table(scan.text(), len(scan.first)), dict[int, str]()
        if table is None:
            scan = scan_rows(self.extents, text, each=True)
            bounds = zip(text.starts[scan.first], text.starts[scan.after], strict=True)
            rows = [lines.data[start : end - 1] for start, end in bounds]
            faults = self.reader.faults(rows)
            good = [row + b"\n" for i, row in enumerate(rows) if i not in faults]
            table = self.reader.table(b"".join(good), len(good))
            if table is None:
                raise RuntimeError("rows that can be read one by one cannot be read together")
        return _parsed(scan, table, faults)


def _parsed(scan: Scan, table: pa.Table, faults: Mapping[int, str]) -> Parsed:
    """What was read of a scan's rows but for those with faults, by index."""
    starts, data = scan.lines.starts, scan.lines.data
    lost = [(line, extent.lines, str(extent.fault)) for line, extent in scan.faults.items()]
    lost += [(int(scan.first[i]), int(scan.after[i] - scan.first[i]), reason) for i, reason in faults.items()]
    bad = [
        BadLine(line, reason, row_text(data[starts[line] : starts[line + count] - 1]), count)
        for line, count, reason in lost
    ]
    bad_rows = np.array(list(faults), np.int64)
    first, after = np.delete(scan.first, bad_rows), np.delete(scan.after, bad_rows)
    lines = int((after - first).sum())
    return Parsed(table, scan.count, int(starts[scan.count]), scan.blank, lines, bad, first=first)


def _has_lone_return(data: bytes) -> bool:
    return b"\r" in data and data.count(b"\r") != data.count(b"\r\n")
