"""Parts of files, read from a store by few and large requests that run side by side."""

import errno
import io
from bisect import bisect_right, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.patience import patiently
from pipeline.storage.store_path import StorePath

Range = tuple[int, int]  # of a file, the bytes start .. stop - 1

GAP_BYTES = 1 << 20  # to read what lies between two ranges takes less than another request
REQUEST_BYTES = 8 << 20  # of one request at most: larger ranges are read by several at once
REQUESTS = 16  # at the same time
BLOCK_BYTES = 1 << 20  # that a RangedFile reads at least


class ShortFileError(OSError):
    """A file ends too early; it has no number, as errors of damaged files have none."""


def coalesced(ranges: Sequence[Range], gap: int = GAP_BYTES) -> list[Range]:
    """Ranges that cover these, ascending and apart: with at most `gap` bytes between two they are one. None is empty."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if stop <= start:
            continue
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def requests_of(ranges: Sequence[Range]) -> list[Range]:
    """Ranges in parts of REQUEST_BYTES at most, as `read_ranges` reads them; it need not join what was cut before."""
    return [(at, min(at + REQUEST_BYTES, stop)) for start, stop in ranges for at in range(start, stop, REQUEST_BYTES)]


def read_ranges(path: Path, ranges: Sequence[Range]) -> list[bytes]:
    """The content of some ranges of a file, in their order; from a store they are read at the same time.

    Raises:
        OSError: as StorePath's methods; without a number where the file ends before a range does.
    """
    if not isinstance(path, StorePath):
        return _of_mounted(path, ranges)
    parts = [(index, *part) for index, span in enumerate(ranges) for part in requests_of([span])]
    content: dict[int, bytes] = {}  # what has come is not asked for again

    def fetch() -> None:
        left = [number for number in range(len(parts)) if number not in content]
        starts, stops = [parts[number][1] for number in left], [parts[number][2] for number in left]
        options = {"batch_size": REQUESTS} if path.system.async_impl else {}
        answers = path.system.cat_ranges([path.key] * len(left), starts, stops, on_error="return", **options)
        content.update((n, answer) for n, answer in zip(left, answers, strict=True) if isinstance(answer, bytes))
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    try:
        if parts:
            patiently(path, fetch)
    except OSError as error:
        last = max(stop for *_, stop in parts)
        if error.errno == errno.EINVAL and path.stat().st_size < last:  # as S3 answers a range beyond the end
            raise ShortFileError(f"{path} ends before byte {last:,}") from None
        raise
    found: list[list[bytes]] = [[] for _ in ranges]
    for number, (index, start, stop) in enumerate(parts):
        if len(content[number]) != stop - start:
            raise ShortFileError(f"{path} ends before byte {stop:,}")
        found[index].append(content[number])
    return [pieces[0] if len(pieces) == 1 else b"".join(pieces) for pieces in found]


def _of_mounted(path: Path, ranges: Sequence[Range]) -> list[bytes]:
    found = []
    with path.open("rb") as file:
        for start, stop in ranges:
            file.seek(start)
            found.append(file.read(stop - start))
            if len(found[-1]) != stop - start:
                raise ShortFileError(f"{path} ends before byte {stop:,}")
    return found


class RangedFile(io.RawIOBase):
    """A file of which parts are read where they are asked for, and kept where they were fetched before.

    Args:
        path: on a store, or mounted. size: of the file, in bytes; None: asked for.
    Raises:
        OSError: as `read_ranges`, from its methods too.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self.length = path.stat().st_size if size is None else size
        self.position = 0
        self.kept: list[tuple[int, bytes]] = []  # ascending by their begin, apart from each other
        self.block: tuple[int, bytes] = (0, b"")  # the last that was read without being fetched before

    def fetch(self, ranges: Sequence[Range], gap: int = GAP_BYTES) -> None:
        """Reads ranges at once and keeps them until `forget`."""
        wanted = coalesced(ranges, gap)
        for (start, _), content in zip(wanted, read_ranges(self.path, wanted), strict=True):
            insort(self.kept, (start, content), key=lambda part: part[0])

    def forget(self) -> None:
        """Frees what was fetched."""
        self.kept.clear()
        self.block = (0, b"")

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer, but at the file's end."""
        view = memoryview(buffer).cast("B")
        size = max(min(len(view), self.length - self.position), 0)
        done = 0
        while done < size:
            place = self.position + done
            start, content = self._part(place, size - done)
            piece = memoryview(content)[place - start : place - start + size - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
        self.position += size
        return size

    def _part(self, place: int, size: int) -> tuple[int, bytes]:
        """A part of the file that has the byte `place`, and where it begins; one that is read now has `size` bytes or more."""
        index = bisect_right(self.kept, place, key=lambda part: part[0])
        if index and place < self.kept[index - 1][0] + len(self.kept[index - 1][1]):
            return self.kept[index - 1]
        if not self.block[0] <= place < self.block[0] + len(self.block[1]):
            end = self.kept[index][0] if index < len(self.kept) else self.length
            stop = min(place + max(size, BLOCK_BYTES), end)
            self.block = (place, read_ranges(self.path, [(place, stop)])[0])
        return self.block

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        position = offset + (0, self.position, self.length)[whence]
        if position < 0:
            raise OSError(errno.EINVAL, "Invalid argument", str(self.path))
        self.position = position
        return position

    def tell(self) -> int:
        """As of any file."""
        return self.position

    def size(self) -> int:
        """Bytes of the whole file."""
        return self.length

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True
