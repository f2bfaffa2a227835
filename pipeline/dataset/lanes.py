"""Lanes: which of them a rank reads, their windows, and the rows taken from a stream of windows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from features.batch import Rows
from features.errors import UserError

BLOCK = 2048  # rows of short windows that are shuffled at once


@dataclass(frozen=True)
class Share:
    """Which of a lane's rows in each global batch are a rank's: start .. stop - 1 of them."""

    lane: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows start .. stop - 1 of a lane, the index-th of its windows; the first one is row `place` of the permuted split."""

    index: int
    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop - 1 of a row group, named by its place in the split."""

    group: int
    start: int
    stop: int


def check_sizes(batch_size: int, lanes: int, ranks: int) -> None:
    """Raises UserError where a batch cannot be shared by lanes or ranks."""
    if batch_size % lanes:
        raise UserError(
            f"batch_size={batch_size} must be divisible by lanes={lanes}: every batch takes equally from each lane"
        )
    if ranks > batch_size:
        raise UserError(
            f"batch_size={batch_size} leaves some of the {ranks} ranks without a row: set train.batch_size to {ranks} or more"
        )


def shares(batch_size: int, lanes: int, rank: int, ranks: int) -> list[Share]:
    """What a rank reads: whole lanes, or the parts of them that its places in a batch lie in."""
    size = batch_size // lanes
    if lanes % ranks == 0:
        return [Share(lane, 0, size) for lane in range(rank, lanes, ranks)]
    start, stop = batch_size * rank // ranks, batch_size * (rank + 1) // ranks
    return [
        Share(lane, max(start - lane * size, 0), min(stop - lane * size, size))
        for lane in range(start // size, -(-stop // size))
    ]


def blocks(windows: Iterable[Window], end_G: np.ndarray) -> Iterator[list[Window]]:
    """Windows that follow each other in the same row groups, BLOCK rows at a time: short ones would cost a step each."""
    block: list[Window] = []
    end = 0
    for window in windows:
        stop = window.place + window.stop - window.start
        if block and (stop > end or window.place - block[0].place != window.start - block[0].start):
            yield block
            block = []
        if not block:
            end = max(stop, min(window.place + BLOCK, int(end_G[np.searchsorted(end_G, stop - 1, "right")])))
        block.append(window)
    if block:
        yield block


def pieces_of(block: Sequence[Window], order: np.ndarray, end_G: np.ndarray) -> list[Piece]:
    """The parts of row groups that hold the rows of windows that follow each other.

    Args:
        order: the row groups of a split, permuted. end_G: the row of the permuted split at which each ends.
    """
    start, pieces = block[0].place, []
    stop = start + block[-1].stop - block[0].start
    first, last = np.searchsorted(end_G, [start, stop - 1], "right").tolist()
    for place in range(first, last + 1 if start < stop else first):
        begin, end = int(end_G[place - 1]) if place else 0, int(end_G[place])
        pieces.append(Piece(int(order[place]), max(start - begin, 0), min(stop, end) - begin))
    return pieces


class Buffer:
    """Takes rows from a stream of windows, as many at a time as asked for."""

    def __init__(self, windows: Iterator[Rows]) -> None:
        self.windows, self.rows, self.used = windows, next(windows), 0

    @property
    def nothing(self) -> Rows:
        """No rows."""
        return self.rows.slice(0, 0)

    def take(self, count: int) -> list[Rows]:
        """The next `count` rows, in pieces; fewer at the stream's end."""
        return [self.rows.slice(start, stop) for start, stop in self._spans(count)]

    def skip(self, count: int) -> None:
        """Leaves the next `count` rows out."""
        for _ in self._spans(count):
            pass

    def _spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Begin and end of the next `count` rows in `rows`, which is one window after the other; fewer at the stream's end."""
        while count:
            if self.used == len(self.rows):
                following = next(self.windows, None)
                if following is None:
                    break
                self.rows, self.used = following, 0
                continue
            start, self.used = self.used, min(self.used + count, len(self.rows))
            count -= self.used - start
            yield start, self.used
