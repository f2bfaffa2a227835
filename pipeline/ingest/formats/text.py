"""Text formats in which a line is a row: files cut at line ends, and which of the lines are not rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa

from pipeline.ingest.files import BLOCK_BYTES, BOM, RawFile, Unit, codec_of, open_text, readable
from pipeline.ingest.formats.base import BadLine, Block, OnBytes

NEWLINE = ord("\n")
CACHED_BYTES = 1 << 18
TAIL_BYTES = 1 << 16  # read at a time for the end of a range's last line
HEAD_BYTES = 1 << 18
NOT_UTF8 = "not UTF-8"


@dataclass(frozen=True)
class Lines:
    """Parsed lines of text.

    Attributes:
        columns: a row for each good line.
        count: lines, blank and bad ones among them.
        skipped: indices of the blank and bad lines, in ascending order.
        bad: the bad ones, numbered from 0.
    """

    columns: pa.Table
    count: int
    skipped: np.ndarray
    bad: list[BadLine]


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


def head_of(file: RawFile) -> bytes:
    """The first bytes of a text file, decompressed. Raises UserError where it cannot be opened."""
    with readable(file.path), open_text(file.path, cache="none") as (stream, _):
        return stream.read(HEAD_BYTES).removeprefix(BOM)


def byte_ranges(file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:
    """A file cut into equal ranges of bytes; whole where it is compressed, or has to be (see RawFormat.units)."""
    if whole or codec_of(file.path) or file.size <= unit_bytes:
        return [Unit(file, number)]
    count = -(-file.size // unit_bytes)
    bounds = [file.size * i // count for i in range(count + 1)]
    return [Unit(file, number, start, stop, start) for start, stop in zip(bounds, bounds[1:], strict=False)]


def line_blocks(unit: Unit, parser: LineParser, has_header: bool, on_bytes: OnBytes) -> Iterator[Block]:
    """The blocks of a unit (see RawFormat.read), the first of whose lines that is not blank may be a header."""
    row, line, header = 0, 1, has_header
    for data in _chunks(unit, on_bytes):
        first = line
        if header:
            rest, header = _after_header(data)
            line += data.count(b"\n") - rest.count(b"\n")
            data = rest
        found = parse(data, parser)
        bad = [replace(each, line=line + each.line) for each in found.bad]
        numbers = partial(_line_numbers, found, line)
        line += found.count
        yield Block(found.columns, row, numbers, bad, line - first)
        row += found.columns.num_rows


def _chunks(unit: Unit, on_bytes: OnBytes) -> Iterator[bytes]:
    """Whole lines of the unit, without a byte order mark."""
    path, packed = unit.file.path, codec_of(unit.file.path) is not None
    stop, first = unit.file.size if unit.stop is None else unit.stop, unit.start == 0
    with (
        readable(path, to_its_end=True),
        open_text(path, cache="readahead" if packed else "none") as (stream, raw),
    ):
        for data in whole_lines(stream, 0, None) if packed else whole_lines(raw, unit.start, stop):
            yield data.removeprefix(BOM) if first else data
            first = False
            on_bytes(min(raw.tell(), stop) - unit.start)


def _after_header(data: bytes) -> tuple[bytes, bool]:
    """What follows the first line that is not blank, and whether that is still to come."""
    filled = data.lstrip(b"\r\n")
    return filled.partition(b"\n")[2], not filled


def _line_numbers(lines: Lines, first: int) -> np.ndarray:
    return np.delete(np.arange(first, first + lines.count), lines.skipped)


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
    """The rest of the line, to its end, which a file's last line may lack."""
    found = b""
    while data := stream.read(TAIL_BYTES):
        end = data.find(b"\n") + 1
        if end:
            return found + data[:end]
        found += data
    return found + b"\n"


def parse(data: bytes, parser: LineParser) -> Lines:
    """Reads whole lines; a bad one costs itself only."""
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
        raise RuntimeError("lines that can be read one by one cannot be read together")
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


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
