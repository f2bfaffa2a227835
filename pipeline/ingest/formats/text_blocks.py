"""The blocks of a text file: its lines a block at a time, each handed to a parser of rows, and counted."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.ingest.files import Unit
from pipeline.ingest.formats.base import BadLine, Block, LineCounts, OnBytes
from pipeline.ingest.formats.text import (
    LongLine,
    PhysicalLines,
    WholeLines,
    beginning_of,
    lines_between,
    lines_of,
    too_long,
)


@dataclass(frozen=True)
class Parsed:
    """The rows of some lines.

    Attributes:
        columns: a row for each good one.
        skipped: for rows of one line, indices of the lines that are none, in ascending order; None for no such.
        first: for rows of several lines, the index of each one's first.
        count, size: lines that were read, and their bytes; the others depend on what follows.
        blank, row_lines: lines without text between rows, and those that good rows take.
        bad: what is not a row, numbered from 0.
    """

    columns: pa.Table
    count: int
    size: int
    blank: int
    row_lines: int
    bad: list[BadLine]
    skipped: np.ndarray | None = None
    first: np.ndarray | None = None

    def line_numbers(self, before: int) -> np.ndarray:
        """The number of each row's first line, from 1, after as many lines before these."""
        if self.first is not None:
            return self.first + before + 1
        lines = np.arange(before + 1, before + 1 + self.count)
        return lines if self.skipped is None else np.delete(lines, self.skipped)


class RowParser(Protocol):
    """A text format."""

    def header_lines(self, lines: WholeLines, complete: bool) -> tuple[int, int]:
        """How many lines from the beginning of a file on are blank, and how many of a header follow, 0 for more to come."""

    def parse(self, lines: WholeLines, following: WholeLines | None) -> Parsed:
        """Reads lines, the first of which is not within a row.

        Args:
            following: lines after these, of which no rows are read, as many as a row may have; None: they will come later,
                and lines whose rows depend on them are to be left.
        """


END = WholeLines(b"", [])


def text_blocks(unit: Unit, parser: RowParser, has_header: bool, limit: int, on_bytes: OnBytes) -> Iterator[Block]:
    """The blocks of a unit (see RawFormat.read); lines of more than `limit` bytes, their end not counted, are bad."""
    physical = PhysicalLines()
    blocks = _Blocks(parser, has_header, limit, physical)
    for lines in lines_of(unit, limit, physical, on_bytes):
        yield from blocks.add(lines, None)
    if blocks.pending.data:
        stop = unit.file.size if unit.stop is None else unit.stop
        following = lines_between(unit.file, stop, stop + limit + 2, limit) if stop < unit.file.size else END
        yield from blocks.add(END, following)


class _Blocks:
    """Makes blocks of lines as they come.

    Attributes:
        pending: lines that were not parsed yet.
    """

    def __init__(self, parser: RowParser, has_header: bool, limit: int, physical: PhysicalLines) -> None:
        self.parser, self.header, self.limit, self.physical = parser, has_header, limit, physical
        self.pending = END
        self.row, self.line, self.counted = 0, 0, 0

    def add(self, lines: WholeLines, following: WholeLines | None) -> Iterator[Block]:
        """The block of further lines, unless all of them depend on what follows."""
        lines, blank, header = joined(self.pending, lines), 0, 0
        if self.header:
            blank, header = self.parser.header_lines(lines, following is not None)
            self.header = not header
        rest = without_first(lines, _size(lines.data, blank + header), blank + header)
        if self.header:
            self.pending = rest
            parsed = Parsed(self.parser.parse(END, END).columns, 0, 0, 0, 0, [])
        else:
            parsed = self.parser.parse(rest, following)
            self.pending = without_first(rest, parsed.size, parsed.count)
        if blank + header + parsed.count:
            counts = LineCounts(0, header, blank + parsed.blank, parsed.row_lines, 0)
            yield self._block(lines, blank + header, parsed, counts)

    def _block(self, lines: WholeLines, header: int, parsed: Parsed, counts: LineCounts) -> Block:
        """The block of what was read of lines, the first of which are no rows, as many as `header`."""
        before, taken = self.line + header, header + parsed.count
        bad = [replace(each, line=each.line + before + 1) for each in parsed.bad]
        long = [each for each in lines.long if each.index < taken]
        bad += [self._long_line(each) for each in long]
        counts += LineCounts(self.physical.count - self.counted, 0, -len(long), 0, sum(each.lines for each in bad))
        block = Block(
            parsed.columns, self.row, partial(parsed.line_numbers, before), sorted(bad, key=lambda each: each.line),
            taken, counts=counts,
        )  # fmt: skip
        self.row, self.line, self.counted = self.row + parsed.columns.num_rows, self.line + taken, self.physical.count
        return block

    def _long_line(self, each: LongLine) -> BadLine:
        reason = too_long("line", each.size, self.limit)
        return BadLine(self.line + 1 + each.index, reason, beginning_of(each.beginning, each.size))


def joined(lines: WholeLines, more: WholeLines) -> WholeLines:
    """Lines and those after them."""
    if not lines.data or not more.data:
        return more if more.data else lines
    before = lines.data.count(b"\n")
    return WholeLines(
        lines.data + more.data, lines.long + [replace(each, index=before + each.index) for each in more.long]
    )


def without_first(lines: WholeLines, size: int, count: int) -> WholeLines:
    """Lines without the first ones, as many as `count`, which have `size` bytes."""
    if not count:
        return lines
    if size == len(lines.data):
        return END
    long = [replace(each, index=each.index - count) for each in lines.long if each.index >= count]
    return WholeLines(lines.data[size:], long)


def _size(data: bytes, count: int) -> int:
    """The bytes of as many lines."""
    size = 0
    for _ in range(count):
        size = data.index(b"\n", size) + 1
    return size
