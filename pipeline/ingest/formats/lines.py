"""Formats in which a line is a row: whole blocks are parsed at once, and those with a bad line again, line by line."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.ingest.files import Unit
from pipeline.ingest.formats.base import BadLine, Block, OnBytes
from pipeline.ingest.formats.csv_rows import TextLines
from pipeline.ingest.formats.csv_spans import Span, SpanFinder
from pipeline.ingest.formats.text import CACHED_BYTES, NEWLINE, WholeLines, row_text
from pipeline.ingest.formats.text_blocks import Parsed, joined, text_blocks


class LineParser(Protocol):
    """A format in which a line is a row.

    Attributes:
        spaces: characters that a blank line may hold.
    """

    spaces: bytes

    def table(self, data: bytes, rows: int) -> pa.Table | None:
        """The rows of `data`, whole lines; None where they are not `rows` good ones."""

    def faults(self, lines: Sequence[bytes]) -> dict[int, str]:
        """The reasons why lines, none of them blank, are not rows, by index; good ones are left out."""


def line_blocks(
    unit: Unit, parser: LineParser, has_header: bool, limit: int, on_bytes: OnBytes, spans: SpanFinder | None = None
) -> Iterator[Block]:
    """The blocks of a unit (see RawFormat.read), the first of whose lines that is not blank may be a header.

    Lines of more than `limit` bytes, their end not counted, are bad; and the lines of a row that takes several, where `spans`
    finds such.
    """
    return text_blocks(unit, LineRows(parser, spans), has_header, limit, on_bytes)


class LineRows:
    """A RowParser of rows that are lines."""

    def __init__(self, parser: LineParser, spans: SpanFinder | None = None) -> None:
        self.parser, self.spans = parser, spans

    def header_lines(self, lines: WholeLines, complete: bool) -> tuple[int, int]:  # noqa: ARG002
        """See RowParser: the first line that is not blank."""
        filled = lines.data.lstrip(b"\r\n")
        return lines.data.count(b"\n", 0, len(lines.data) - len(filled)), int(bool(filled))

    def parse(self, lines: WholeLines, following: WholeLines | None) -> Parsed:
        """See RowParser; a bad line costs itself only."""
        if self.spans and not self.spans.begin(_text_lines(lines, following)):
            return self._parsed(b"", 0, 0, 0, [], np.empty(0, np.int64))
        count, blank = _count_lines(lines.data)
        if not (self.spans and self.spans.taken):
            table = self.parser.table(lines.data, count - len(blank))
            if table is not None:
                return Parsed(table, count, len(lines.data), len(blank), table.num_rows, [], blank)
        taken, spans = 0, list[Span]()
        if self.spans:
            taken = self.spans.taken
            spans, count = self.spans.find(_text_lines(lines, following), count)
        return self._one_by_one(joined(lines, following) if following else lines, count, taken, spans)

    def _one_by_one(self, lines: WholeLines, count: int, taken: int, spans: list[Span]) -> Parsed:
        """The first lines, as many as `count`: `taken` of them and those of `spans` are no rows, whatever they hold."""
        found = lines.data.split(b"\n")
        size = sum(map(len, found[:count])) + count
        lost = set(range(taken)).union(*(range(span.line, span.line + span.lines) for span in spans))
        others = [i for i in range(count) if i not in lost]
        filled = [i for i in others if found[i].strip(self.parser.spaces)]
        faults = {filled[i]: reason for i, reason in self.parser.faults([found[i] for i in filled]).items()}
        bad = [BadLine(i, reason, row_text(found[i])) for i, reason in faults.items()]
        bad += [
            BadLine(each.line, each.reason, row_text(b"\n".join(found[each.line : each.line + each.lines])), each.lines)
            for each in spans
        ]
        good = [i for i in filled if i not in faults]
        skipped = np.setdiff1d(np.arange(count), np.array(good, np.int64))
        data = b"".join([found[i] + b"\n" for i in good])
        return self._parsed(data, len(good), count, size, bad, skipped, len(others) - len(filled))

    def _parsed(
        self, data: bytes, rows: int, count: int, size: int, bad: list[BadLine], skipped: np.ndarray, blank: int = 0
    ) -> Parsed:
        table = self.parser.table(data, rows)
        if table is None:
            raise RuntimeError("lines that can be read one by one cannot be read together")
        return Parsed(table, count, size, blank, rows, bad, skipped)


def _text_lines(lines: WholeLines, following: WholeLines | None) -> TextLines:
    found = joined(lines, following) if following else lines
    return TextLines(found.data, [each.index for each in found.long], following is not None)


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
