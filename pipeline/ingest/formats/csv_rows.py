"""Rows of CSV that take several lines: where a row ends, and from where on rows are read again after one that is faulty."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from features.source import Format
from pipeline.ingest.formats.csv_quotes import (
    LONE_RETURN,
    NEWLINE,
    OPEN_QUOTE,
    RETURN,
    STRAY_QUOTE,
    TOO_MANY,
    Quotes,
)

NOT_CLOSED = "a quote is not closed{}: set quote: null where quotes are plain characters"
RETURN_OUTSIDE = "a carriage return outside quotes: write line ends as LF or CRLF"
AT_ONCE = 1 << 12  # rows that are found together: after an irregular row they are found anew
FURTHER = 16
FEW = 16  # rows between two irregular ones, where reading all of them byte by byte takes less time


@dataclass(frozen=True)
class TextLines:
    """Whole lines with their ends.

    Attributes:
        long: in ascending order the indices of lines that are empty here since they are too long to be read; no row goes on
            beyond one.
        complete: whether no row goes on after the last line either; else it may, in lines that are not read yet.
    """

    data: bytes
    long: Sequence[int]
    complete: bool

    @cached_property
    def ends(self) -> np.ndarray:
        """Offsets after each line."""
        return np.flatnonzero(np.frombuffer(self.data, np.uint8) == NEWLINE) + 1

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the lines begin, and where they end."""
        return np.append(0, self.ends)


@dataclass(frozen=True)
class Extent:
    """What begins at a line: a row, or with a fault the lines that are lost for it. The next row begins after `lines`."""

    lines: int
    fault: str | None


class RowExtents:
    """Where rows end that begin at a given line, found byte by byte.

    A row has at most `max_row_lines` lines and `max_line_bytes` bytes. Where its quotes are not closed in these, or text
    follows a closing one, only its first line is lost. Where they are closed but the number of columns is wrong, all its
    lines are lost, unless its first and its last line each have the right number by themselves: then the first one has a
    stray quote. Of two columns that may be by chance, so there the lines are lost.

    A row of several lines is not followed beyond twice its columns, and FURTHER ones, so that no line is read more often than
    that, whatever the quotes in it: there, too, only the first line is lost.
    """

    def __init__(self, options: Format, columns: int) -> None:
        """`columns` are those that a row should have."""
        self.quotes, self.columns = Quotes(options), columns
        self.max_lines, self.max_bytes = options.max_row_lines, options.max_line_bytes

    def at(self, lines: TextLines, first: int, within: bool = False) -> Extent | None:
        """The extent of the row that begins at the line of index `first`.

        Args:
            within: the line begins within quotes, and so within a row.

        Returns:
            None where that depends on what follows the lines.
        """
        data, ends, start = lines.data, lines.ends, int(lines.starts[first])
        if not within and data.startswith((b"\n", b"\r\n"), start):
            return Extent(1, None)
        by_number = first + self.max_lines - within
        by_size = int(np.searchsorted(ends, start + self.max_bytes + 1, side="right"))
        next_long = bisect_left(lines.long, first)
        if limited := next_long < len(lines.long):
            by_size = min(by_size, lines.long[next_long])
        stop = max(min(by_number, by_size, len(ends)), first + 1)
        most = 2 * self.columns + FURTHER
        found = self.quotes.row(data, start, int(ends[stop - 1]), within, None if within else (int(ends[first]), most))
        if found.fault == OPEN_QUOTE:
            if stop >= by_number:
                return Extent(1, NOT_CLOSED.format(f" within max_row_lines={self.max_lines} lines"))
            if stop < len(ends) or limited:
                return Extent(1, NOT_CLOSED.format(f" within max_line_bytes={self.max_bytes} bytes"))
            return Extent(1, NOT_CLOSED.format("")) if lines.complete else None
        if found.fault == TOO_MANY:
            return Extent(1, f"more than {most} columns instead of {self.columns}")
        if found.fault:
            return Extent(1, RETURN_OUTSIDE if found.fault == LONE_RETURN else found.fault)
        count = int(np.searchsorted(ends, found.end)) - first + 1
        if within or found.columns == self.columns:
            return Extent(count, None)
        if count > 1 and self._is_stray(lines, first, first + count - 1):
            return Extent(1, STRAY_QUOTE)
        return Extent(count, columns_fault(found.columns, self.columns))

    def _is_stray(self, lines: TextLines, first: int, last: int) -> bool:
        """Whether the first and the last line of a row are rather rows by themselves."""
        if self.columns <= 2:
            return False
        data, starts = lines.data, lines.starts
        alone = self.quotes.row(data, int(starts[last]), int(starts[last + 1]))
        return (
            alone.fault is None
            and alone.columns == self.columns
            and self.quotes.plain_columns(data, int(starts[first]), int(starts[first + 1])) == self.columns
        )


def columns_fault(found: int, expected: int) -> str:
    """The reason why a row with another number of columns is bad."""
    return f"{found} columns instead of {expected}"


@dataclass
class Scan:
    """The rows of lines.

    Attributes:
        first, after: index of each row's first line, and of the line after its last.
        faults: what is lost, by first line.
        count: the first lines, that were read; a row of the others ends beyond them.
        blank: of these, lines without text that are between rows.
    """

    lines: TextLines
    first: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    after: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    faults: dict[int, Extent] = field(default_factory=dict)
    count: int = 0
    blank: int = 0

    def text(self) -> bytes:
        """The lines that were read, without the faulty ones."""
        data, starts, start = memoryview(self.lines.data), self.lines.starts, 0
        if not self.faults and self.count == len(self.lines.ends):
            return self.lines.data
        kept = []
        for line, lost in self.faults.items():
            kept.append(data[start : starts[line]])
            start = int(starts[line + lost.lines])
        return b"".join([*kept, data[start : starts[self.count]]])


def scan_rows(extents: RowExtents, lines: TextLines, each: bool = False) -> Scan:
    """The rows of lines, the first of which begins one: all of them at once as far as their quotes are regular.

    Args:
        each: reads every row of several lines byte by byte, so that those with a wrong number of columns are found.
    """
    scan = Scan(lines)
    after, run, decided = list[np.ndarray](), 1, True
    regular = _RegularRows(extents, lines)
    while decided and scan.count < len(lines.ends):
        found, stopped = regular.after(scan.count, each)
        after.append(found)
        scan.count = int(found[-1]) if len(found) else scan.count
        run = 1 if len(found) > FEW else min(2 * run, AT_ONCE)
        if stopped:
            found, decided = _irregular_rows(extents, scan, run)
            after.append(found)
    _place(scan, np.concatenate(after) if after else np.empty(0, np.int64))
    return scan


def _irregular_rows(extents: RowExtents, scan: Scan, run: int) -> tuple[np.ndarray, bool]:
    """Reads as many rows byte by byte. Returns the line after each one that has no fault, and whether all were found."""
    after = list[int]()
    for _ in range(run):
        if scan.count == len(scan.lines.ends):
            break
        extent = extents.at(scan.lines, scan.count)
        if extent is None:
            return np.array(after, np.int64), False
        if extent.fault:
            scan.faults[scan.count] = extent
        scan.count += extent.lines
        if not extent.fault:
            after.append(scan.count)
    return np.array(after, np.int64), True


def _place(scan: Scan, after: np.ndarray) -> None:
    """Sets the rows that are not blank, given the line after each."""
    starts, text = scan.lines.starts, np.frombuffer(scan.lines.data, np.uint8)
    first = np.append(0, after)[:-1]
    if scan.faults:  # a row begins after the fault, if one is between it and the row before
        faulty = np.array([line + lost.lines for line, lost in scan.faults.items()])
        first = np.maximum(first, np.append(0, faulty)[np.searchsorted(faulty, after, side="right")])
    size = starts[after] - starts[first]
    blank = (size == 1) | ((size == 2) & (text[starts[first]] == RETURN))
    scan.first, scan.after, scan.blank = first[~blank], after[~blank], int(np.count_nonzero(blank))


class _RegularRows:
    """Row ends of lines as far as their quotes are regular, from any line on."""

    def __init__(self, extents: RowExtents, lines: TextLines) -> None:
        self.extents, self.lines = extents, lines
        self.positions = extents.quotes.positions(lines.data)
        before = np.searchsorted(self.positions, lines.ends)  # quotes before each line's end
        opens, closes = extents.quotes.neighbours(lines.data, self.positions)
        even = np.arange(len(self.positions)) % 2 == 0
        returns = _lone_returns(lines.data)
        odd_returns = np.searchsorted(self.positions, returns) % 2
        self.row_ends, self.irregular = list[np.ndarray](), list[np.ndarray]()
        for base in (0, 1):  # whether an even or an odd number of quotes is before the line where a row begins
            self.row_ends.append(np.flatnonzero(before % 2 == base))
            wrong = self.positions[np.where(even == (base == 0), ~opens, ~closes)]
            self.irregular.append(np.sort(np.append(wrong, returns[odd_returns == base])))

    def after(self, line: int, each: bool) -> tuple[np.ndarray, bool]:
        """Given the first line of a row, the line after it and after each of the next ones.

        Returns:
            These, and whether the last one begins a row that has to be read byte by byte.
        """
        ends, starts = self.lines.ends, self.lines.starts
        base = int(np.searchsorted(self.positions, starts[line])) % 2
        row_ends, irregular = self.row_ends[base], self.irregular[base]
        next_ = np.searchsorted(irregular, starts[line])
        stop = irregular[next_] if next_ < len(irregular) else ends[-1]
        low = np.searchsorted(row_ends, line)
        high = np.searchsorted(row_ends, np.searchsorted(ends, stop, side="right"))
        last = row_ends[low : min(high, low + AT_ONCE)]
        first = np.append(line, last[:-1] + 1)[: len(last)]
        count = last - first + 1
        wrong = (count > self.extents.max_lines) | (ends[last] - starts[first] > self.extents.max_bytes + 1)
        if len(self.lines.long):
            wrong |= (count > 1) & (
                np.searchsorted(self.lines.long, last, "right") > np.searchsorted(self.lines.long, first)
            )
        if each:
            wrong |= count > 1
        found = last[: int(np.argmax(wrong))] if wrong.any() else last
        return found + 1, bool(len(found) < len(last) or low + len(last) == high)


def _lone_returns(data: bytes) -> np.ndarray:
    """Offsets of the carriage returns that end no line."""
    if b"\r" not in data or data.count(b"\r") == data.count(b"\r\n"):
        return np.empty(0, np.int64)
    text = np.frombuffer(data, np.uint8)
    returns = np.flatnonzero(text == RETURN)
    return returns[text[returns + 1] != NEWLINE]
