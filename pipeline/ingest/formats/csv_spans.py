"""Rows of several lines where a line should be a row: their lines are one dead letter, and none of them a row by itself.

Whether a line belongs to such a row depends on the lines before it, but on no more of them than a row may have: every line
that leaves a quote open is tried as a first one, whether or not it is within another row itself. So parts of a file are read
like the whole. A line within several rows counts for the first.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.ingest.formats.csv_quotes import LINE_BREAKS
from pipeline.ingest.formats.csv_rows import RowExtents, TextLines


@dataclass(frozen=True)
class Span:
    """Lines of a row of several: the index of the first one, their number, and why they are bad."""

    line: int
    lines: int
    reason: str


class SpanFinder:
    """Finds the rows of several lines in consecutive blocks of a unit."""

    def __init__(self, extents: RowExtents, before: Callable[[], bytes] | None) -> None:
        """`before` reads the lines before the unit, as many bytes as a row may have; None at a file's beginning."""
        self.extents, self.before = extents, before
        self.taken = 0  # lines of the next block that belong to a row that began before it

    def begin(self, lines: TextLines) -> bool:
        """Looks for a row that began before the unit, whose first lines are given. False: it takes more of them."""
        if self.before is not None:
            tail = self.extents.at(self._near(lines), 0, within=True)
            if tail is None:
                return False
            if tail.fault is None:  # most often it is not: within quotes, a quote that opens a value looks out of place
                self.taken = self._taken(lines.data[: lines.starts[tail.lines]], tail.lines)
            self.before = None
        return True

    def _near(self, lines: TextLines) -> TextLines:
        """Of lines as many as the rest of a row may have."""
        size = self.extents.max_bytes + 1
        if len(lines.data) <= size:
            return lines
        near = lines.data[: lines.data.rfind(b"\n", 0, size) + 1]
        return TextLines(near, [each for each in lines.long if each < near.count(b"\n")], complete=True)

    def _taken(self, tail: bytes, count: int) -> int:
        """How many of the unit's first lines, at most `count`, belong to rows that began before it."""
        head = self.before() if self.before else b""
        lines = TextLines(head + tail, [], complete=True)
        first = len(lines.ends) - count
        found, _ = self._rows(lines, first)
        return max((line + taken - first for line, taken, _ in found), default=0)

    def find(self, lines: TextLines, count: int) -> tuple[list[Span], int]:
        """The rows of several lines that begin in the first `count` lines.

        Returns:
            The spans, without lines in common and in order, and how many of the lines they are known of; `taken` then
            counts lines after these.
        """
        found, known = self._rows(lines, count)
        spans, reach = list[Span](), self.taken
        for line, taken, reason in found:
            if line + taken > reach:
                first = max(line, reach)
                reach = line + taken
                spans.append(Span(first, reach - first, reason))
        self.taken = max(reach - known, 0)
        return spans, known

    def _rows(self, lines: TextLines, count: int) -> tuple[list[tuple[int, int, str]], int]:
        """Rows of several lines that begin in the first `count`: index, number of lines, reason; and how far they are known."""
        found = list[tuple[int, int, str]]()
        for line in self.extents.quotes.irregular_lines(lines.data, lines.ends):
            if line >= count:
                break
            extent = self.extents.at(lines, line)
            if extent is None:
                return found, line
            if extent.lines > 1:
                found.append((line, extent.lines, extent.fault or LINE_BREAKS))
        return found, count
