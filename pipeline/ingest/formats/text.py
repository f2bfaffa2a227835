"""Text files cut into whole lines, however long these are."""

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from features.errors import UserError
from pipeline.ingest.files import BLOCK_BYTES, BOM, RawFile, Unit, codec_of, open_text, readable
from pipeline.ingest.formats.base import OnBytes
from pipeline.ingest.formats.recognition import PROBED_BYTES, check_packed, check_text

NEWLINE = ord("\n")
CACHED_BYTES = 1 << 18
TAIL_BYTES = 1 << 16  # read at a time for the end of a range's last line
HEAD_BYTES = 1 << 18
SHOWN_BYTES = 1 << 12  # of a line that is too long
NOT_UTF8 = "not UTF-8"


def head_of(file: RawFile, size: int = HEAD_BYTES) -> bytes:
    """The first bytes of a text file, decompressed. Raises UserError where it cannot be opened, or is no such file."""
    with _beginning(file, size) as (head, _):
        return head


def first_line(file: RawFile, limit: int) -> bytes:
    """The first line that is not blank, without its end; empty where there is none.

    Raises:
        UserError: the file cannot be opened, or is no text, or the line is longer than `limit` bytes.
    """
    with _beginning(file, HEAD_BYTES) as (head, stream):
        found = head.lstrip(b"\r\n")
        while b"\n" not in found and len(found) <= limit and (data := stream.read(max(HEAD_BYTES, len(found)))):
            found = (found + data).lstrip(b"\r\n")
    line = found.partition(b"\n")[0]
    if len(line) > limit:
        raise header_too_long(file.path, limit)
    return line.removesuffix(b"\r")


@contextmanager
def _beginning(file: RawFile, size: int) -> Iterator[tuple[bytes, pa.NativeFile]]:
    """The first bytes of a text file, decompressed, and the stream of those after them."""
    with readable(file.path), open_text(file, cache="none") as (stream, raw):
        try:
            head = stream.read(size)
        except (OSError, pa.ArrowException):
            if codec_of(file.path):
                raw.seek(0)
                check_packed(file.path, raw.read(PROBED_BYTES))
            raise
        check_text(file.path, head)
        yield head.removeprefix(BOM), stream


def header_too_long(path: str, limit: int) -> UserError:
    """The error for a header of more than `limit` bytes."""
    return UserError(
        f"{path}: its header line is longer than max_line_bytes={limit:,}. Fix it, name the columns in source.columns, or "
        "raise source.max_line_bytes."
    )


def too_long(what: str, size: int, limit: int) -> str:
    """The reason why a line or row of `size` bytes, `what` says which, is not read."""
    return f"{what} of {size} bytes is longer than max_line_bytes={limit}"


def beginning_of(data: bytes, size: int) -> str:
    """Of a line or row of `size` bytes that begins with `data` the first ones as text, with a mark where more follow."""
    cut = size > SHOWN_BYTES
    text = codecs.utf_8_decode(data[:SHOWN_BYTES].removeprefix(BOM), "replace", not cut)[0]
    return f"{text}…" if cut else text.rstrip("\r")


def row_text(data: bytes) -> str:
    """A bad row, given without its line end, as text."""
    return data.rstrip(b"\r").decode(errors="replace")


def byte_ranges(file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:
    """A file cut into equal ranges of bytes; whole where it is compressed, or has to be (see RawFormat.units)."""
    if whole or codec_of(file.path) or file.size <= unit_bytes:
        return [Unit(file, number)]
    count = -(-file.size // unit_bytes)
    bounds = [file.size * i // count for i in range(count + 1)]
    return [Unit(file, number, start, stop, start) for start, stop in zip(bounds, bounds[1:], strict=False)]


def lines_of(unit: Unit, limit: int, physical: "PhysicalLines", on_bytes: OnBytes) -> Iterator["WholeLines"]:
    """Whole lines of the unit, without a byte order mark; `physical` counts them as they are read."""
    path, packed = unit.file.path, codec_of(unit.file.path) is not None
    stop, first = unit.file.size if unit.stop is None else unit.stop, unit.start == 0
    with (
        readable(path, to_its_end=True),
        open_text(unit.file, cache="readahead" if packed else "none") as (stream, raw),
    ):
        pieces = _pieces(stream, 0, None) if packed else _pieces(raw, unit.start, stop)
        for lines in whole_lines(physical.counted(pieces), limit):
            yield replace(lines, data=lines.data.removeprefix(BOM)) if first else lines
            first = False
            on_bytes(min(raw.tell(), stop) - unit.start)


def lines_between(file: RawFile, start: int, stop: int, limit: int) -> "WholeLines":
    """The lines of a plain file that begin in [start, stop), without a byte order mark."""
    data, long, before = list[bytes](), list[LongLine](), 0
    with readable(file.path, to_its_end=True), open_text(file, cache="none") as (_, raw):
        for lines in whole_lines(_pieces(raw, start, min(stop, file.size)), limit):
            data.append(lines.data)
            long += [replace(each, index=before + each.index) for each in lines.long]
            before += lines.data.count(b"\n")
    found = b"".join(data)
    return WholeLines(found if start else found.removeprefix(BOM), long)


def count_line_ends(data: bytes) -> int:
    """How often LF occurs; several times as fast as `bytes.count`."""
    whole = np.frombuffer(data, np.uint8)
    starts = range(0, len(whole), CACHED_BYTES)
    return sum(int(np.count_nonzero(whole[start : start + CACHED_BYTES] == NEWLINE)) for start in starts)


class PhysicalLines:
    """Counts the lines of text by its bytes, whatever becomes of them: line ends, and a last line without one."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces, none of them empty, counted when the next one is asked for at the latest."""
        ended = True
        for piece in pieces:
            self.count += count_line_ends(piece)
            ended = piece.endswith(b"\n")
            yield piece
        self.count += not ended


@dataclass(frozen=True)
class LongLine:
    """A line that is longer than the limit.

    Attributes:
        index: of the line among those around it.
        size: bytes, without the line end.
        beginning: at least its first SHOWN_BYTES.
    """

    index: int
    size: int
    beginning: bytes


@dataclass(frozen=True)
class WholeLines:
    """Lines with their ends; in place of each of `long` an empty one."""

    data: bytes
    long: list[LongLine]


def whole_lines(pieces: Iterable[bytes], limit: int) -> Iterator[WholeLines]:
    """Pieces of text as whole lines. Of a line of more than `limit` bytes no more than that is kept in memory."""
    begun, size = list[bytes](), 0  # of the line that has not ended: its bytes, or the first ones, and their number
    kept = max(limit, SHOWN_BYTES)
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if end:
            lines, long = piece[:end], list[LongLine]()
            if size > limit:
                skipped = piece.index(b"\n")
                begun.append(piece[: min(skipped, SHOWN_BYTES)])
                lines, long = piece[skipped:end], [LongLine(0, size + skipped, b"".join(begun))]
            elif begun:
                lines = b"".join([*begun, memoryview(piece)[:end]])
            lines, more = _without_long(lines, limit)
            yield WholeLines(lines, long + more)
            begun, size = [], 0
        if size <= kept:
            begun.append(piece[end:])
        size += len(piece) - end
        if size > kept:
            begun = [b"".join(begun)[:SHOWN_BYTES]]
    if size > limit:
        yield WholeLines(b"\n", [LongLine(0, size, b"".join(begun))])
    elif size:
        yield WholeLines(b"".join([*begun, b"\n"]), [])


def _without_long(data: bytes, limit: int) -> tuple[bytes, list[LongLine]]:
    """Whole lines, those of more than `limit` bytes replaced by empty ones; good data costs a search every `limit` bytes."""
    kept, found, start, position, index = list[bytes](), list[LongLine](), 0, 0, 0
    while position < len(data):
        next_ = data.rfind(b"\n", position, position + limit + 1) + 1
        if not next_:  # no line end where this line should have one
            next_ = data.index(b"\n", position)
            index += data.count(b"\n", start, position)
            found.append(LongLine(index, next_ - position, data[position : min(next_, position + SHOWN_BYTES)]))
            kept.append(data[start:position])
            start = next_
        position = next_
    return (b"".join([*kept, data[start:]]) if found else data), found


def _pieces(stream: BinaryIO | pa.NativeFile, start: int, stop: int | None) -> Iterator[bytes]:
    """The lines that begin in [start, stop), in pieces of about BLOCK_BYTES; the last line may have no end."""
    position, within_line = max(start - 1, 0), start > 0
    open_line = False
    if position:
        stream.seek(position)
    while stop is None or position < stop:
        data = stream.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position))
        if not data:
            return
        position += len(data)
        if within_line:  # which began before this range
            _, found, data = data.partition(b"\n")
            within_line = not found
        if data:
            yield data
            open_line = not data.endswith(b"\n")
    size = TAIL_BYTES
    while open_line and (data := stream.read(size)):
        end = data.find(b"\n") + 1
        yield data[:end] if end else data
        open_line, size = not end, min(2 * size, BLOCK_BYTES)


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
