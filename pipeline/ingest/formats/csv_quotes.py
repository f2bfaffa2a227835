"""Quotes of CSV: a block's are checked at once, and rows with irregular ones are read byte by byte.

A quote opens a value where it is its first character, is part of it where it stands twice, and else closes it; then a
delimiter or the line's end follows. In a value without quotes around it a quote is a character like others.
"""

import re
from dataclasses import dataclass

import numpy as np

from features.source import Format

NEWLINE, RETURN = ord("\n"), ord("\r")
OPEN_QUOTE = (
    "a quote is not closed: set quote: null where quotes are plain characters, or multiline: true where values "
    "hold line breaks"
)
AFTER_QUOTE = "text after a closing quote: set quote: null where quotes are plain characters"
STRAY_QUOTE = "a stray quote: set quote: null where quotes are plain characters"
LINE_BREAKS = "a value with line breaks: set multiline: true"
TOO_MANY = "too many columns"
LONE_RETURN = "a carriage return within the line: set multiline: true where values hold line breaks"


@dataclass(frozen=True)
class Row:
    """What was read from the beginning of a row.

    Attributes:
        end: offset after the row; where it has a fault, of that.
        columns: that were found.
        fault: OPEN_QUOTE, AFTER_QUOTE, LONE_RETURN or TOO_MANY.
        opened: offset after the last quote that opened a value.
    """

    end: int
    columns: int
    fault: str | None
    opened: int


class Quotes:
    """The quotes of a dialect. Data are whole lines with their ends; offsets are of bytes."""

    def __init__(self, options: Format) -> None:
        """`options` are those of a file whose `quote` is not null."""
        self.quote, self.delimiter = str(options.quote).encode(), options.delimiter.encode()
        quote, delimiter = re.escape(self.quote), re.escape(self.delimiter)
        self._event = re.compile(delimiter + quote + rb"|\r(?!\n)|\n")
        self._content = re.compile(rb"(?:[^%b]+|%b%b)*" % (quote, quote, quote))
        spaces = b" \t".replace(self.delimiter, b"") if options.trim else b""
        self._padding = re.compile(b"[%b]*" % spaces if spaces else b"")

    def positions(self, data: bytes) -> np.ndarray:
        """Where the quotes are."""
        if self.quote not in data:
            return np.empty(0, np.int64)
        return np.flatnonzero(np.frombuffer(data, np.uint8) == ord(self.quote))

    def neighbours(self, data: bytes, quotes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of all quotes in a row: whether each may open a value, and whether it may close one; half of a pair may be either."""
        twice = np.diff(quotes) == 1
        opens = self._begins_value(data, quotes) | np.append(False, twice)
        return opens, self._ends_value(data, quotes) | np.append(twice, False)

    def _begins_value(self, data: bytes, quotes: np.ndarray) -> np.ndarray:
        before = np.frombuffer(data, np.uint8)[quotes - 1]  # of the first byte the last one, which is a line's end
        return (before == ord(self.delimiter)) | (before == NEWLINE)

    def _ends_value(self, data: bytes, quotes: np.ndarray) -> np.ndarray:
        after = np.frombuffer(data, np.uint8)[quotes + 1]
        return (after == ord(self.delimiter)) | (after == NEWLINE) | (after == RETURN)

    def regular(self, data: bytes) -> bool:
        """Whether all quotes open and close values in turn, in one line or over several."""
        quotes = self.positions(data)
        if not len(quotes):
            return True
        if len(quotes) % 2:
            return False
        if self._begins_value(data, quotes[0::2]).all() and self._ends_value(data, quotes[1::2]).all():
            return True  # as usual: without quotes in values
        opens, closes = self.neighbours(data, quotes)
        return bool(opens[0::2].all() and closes[1::2].all())

    def irregular_lines(self, data: bytes, ends: np.ndarray) -> list[int]:
        """The lines, by index, whose quotes do not open and close values in turn; `ends` are the offsets after the lines."""
        quotes = self.positions(data)
        if not len(quotes):
            return []
        line = np.searchsorted(ends, quotes, side="right")
        nth = np.arange(len(quotes)) - np.searchsorted(line, line)  # within its line
        last = np.append(line[1:] != line[:-1], True)
        opens, closes = self.neighbours(data, quotes)
        return np.unique(line[np.where(nth % 2 == 0, ~opens | last, ~closes)]).tolist()

    def row(self, data: bytes, start: int, stop: int, within: bool = False, most: tuple[int, int] | None = None) -> Row:
        """Reads the row that begins at `start`, as far as `stop`, a line's end.

        Args:
            within: a quoted value goes on there, of a row that began before.
            most: an offset, and how many columns are followed beyond it: no value with quotes that comes after so many.
        """
        position, columns, opened = start, 1, start
        quoted = within
        if not within and data.startswith(self.quote, start):
            quoted, position, opened = True, start + 1, start + 1
        while True:
            if quoted:
                if most and opened > most[0] and columns > most[1]:
                    return Row(position, columns, TOO_MANY, opened)
                position = _end(self._content, data, position, stop)
                if position >= stop:
                    return Row(stop, columns, OPEN_QUOTE, opened)
                position = _end(self._padding, data, position + 1, stop)
                if data[position] not in (NEWLINE, RETURN, ord(self.delimiter)):
                    return Row(position, columns, AFTER_QUOTE, opened)
            found = self._event.search(data, position, stop)
            if found is None:
                raise RuntimeError("lines have ends")
            columns += data.count(self.delimiter, position, found.end())
            position = found.end()
            if found[0] in (b"\n", b"\r"):
                return Row(position, columns, LONE_RETURN if found[0] == b"\r" else None, opened)
            quoted, opened = True, position

    def line_fault(self, line: bytes) -> str | None:
        """The fault of a line without its end, as a row of its own."""
        data = line.removesuffix(b"\r") + b"\n"
        return self.row(data, 0, len(data)).fault

    def plain_columns(self, data: bytes, start: int, stop: int) -> int:
        """The columns of a line if the quote that it leaves open were a character like others; 0 for a line with a fault."""
        found = self.row(data, start, stop)
        rest = data[found.opened : stop].removesuffix(b"\n").removesuffix(b"\r")
        return 0 if b"\r" in rest else found.columns + rest.count(self.delimiter)


def _end(pattern: re.Pattern[bytes], data: bytes, start: int, stop: int) -> int:
    found = pattern.match(data, start, stop)
    return found.end() if found else start
