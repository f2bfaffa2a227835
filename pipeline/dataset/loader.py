"""The loader: global batches that depend on dataset, seed, epoch and batch size alone, never on how many ranks share them.

An epoch permutes the row groups of a split and cuts their rows, end to end, into L lanes of equal length. A lane is
read in order, shuffled within windows. Every global batch takes the same number of rows from each lane, lane after lane,
and a lane that has ended leaves its places empty. So the position of a run is one cursor a lane, whatever the number R of
ranks is. Where R divides L, rank r owns the lanes l with l mod R = r; else it has the places B r // R .. B (r + 1) // R - 1
of a batch of B rows, and reads the lanes that these lie in. Of a dataset of several days each day is permuted and cut by
itself, and a lane reads its part of one day after that of the day before.
"""

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features.batch import Batch, Rows
from features.errors import UserError, one_line
from features.schema.schema import Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.shards import check_ids, open_shard

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """How far a run has read: rows consumed of each lane in an epoch."""

    epoch: int = 0
    cursors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop - 1 of a row group, named by its place in the split."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """Which of a lane's rows in each global batch are a rank's: start .. stop - 1 of them."""

    lane: int
    start: int
    stop: int


class RowKeys(Protocol):
    """What evaluation groups rows by, and which rows it takes."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the dataset that it needs."""

    def of(self, table: pa.Table, row_id_N: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Of N rows the keys, int64 (N, C), and which of the rows are taken, bool (N,); None: all."""


class Loader:
    """Batches of one split for one rank.

    Args:
        dataset: an opened dataset.
        split: whose rows.
        batch_size: rows of a global batch, over all ranks.
        lanes: L, a divisor of batch_size.
        seed: of the shuffles.
        rank, ranks: which share of each global batch is ours.
        window: rows of a lane that are shuffled together, 0 for the dataset's order.
        ahead: batches decoded in advance.
        max_corrupt: share of the split's rows that may be in row groups whose content is damaged. They become rows that count
            in nothing, which keeps all others in their places; each rank logs it once a row group.
        table_sizes: see `pipeline.dataset.shards.table_sizes`; ids outside of their table are then an error. None: not checked.
        keys: fills `Batch.key_BC`. One that does not take all rows is for `SplitReader` alone.

    Raises:
        UserError: an empty split, or as `check_sizes`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        lanes: int = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        window: int = 0,
        ahead: int = 4,
        max_corrupt: float = 0.0,
        table_sizes: Mapping[str, int | None] | None = None,
        keys: RowKeys | None = None,
    ) -> None:
        check_sizes(batch_size, lanes, ranks)
        self.dataset, self.schema, self.shards = dataset, dataset.schema, dataset.shards(split)
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.share, self.size = batch_size // lanes, -(-batch_size // ranks)
        self.shares = shares(batch_size, lanes, rank, ranks)
        self.window, self.ahead = window, ahead
        self.max_corrupt, self.corrupt = max_corrupt, set[int]()
        self.table_sizes, self.keys = table_sizes or {}, keys
        groups = [(shard, index, rows) for shard in self.shards for index, rows in enumerate(shard.row_groups)]
        self.groups = [(shard.path, index) for shard, index, _ in groups]
        self.row_id_offsets = {shard.path: dataset.row_id_offset(shard) for shard in self.shards}
        self.group_rows = np.array([rows for *_, rows in groups], np.int64)
        self.rows = int(self.group_rows.sum())
        day_G = np.array([dataset.day_of(shard) for shard, *_ in groups])
        self.day_names: list[str] = list(dict.fromkeys(day_G.tolist()))
        self.days = [np.flatnonzero(day_G == day) for day in self.day_names]
        rows_S = np.array([self.group_rows[day].sum() for day in self.days])
        self.starts_S = np.cumsum(rows_S) - rows_S
        self.bounds_SL = rows_S[:, None] * np.arange(lanes + 1) // lanes  # of lanes in each day
        self.lengths = np.diff(self.bounds_SL).sum(axis=0)
        self.read_columns = [*self.schema.columns, *(f"label.{t}" for t in self.schema.tasks), "weight", "row_id"]
        self.read_columns = [*dict.fromkeys((*self.read_columns, *(keys.columns if keys else ())))]
        self._open = lru_cache(maxsize=64)(self._open_shard)
        self._reading = threading.Lock()  # two threads that read one ParquetFile crash the process

    def start(self, epoch: int = 0) -> Position:
        """The position at an epoch's begin."""
        return Position(epoch, [0] * self.lanes)

    def after(self, position: Position, steps: int = 1) -> Position:
        """The position `steps` global batches further on in the same epoch."""
        cursors = np.minimum(np.array(position.cursors) + steps * self.share, self.lengths)
        return Position(position.epoch, cursors.tolist())

    def day(self, position: Position) -> str:
        """The day that the next batch begins in, by its first lane; the empty text where there are no days."""
        ends = np.diff(self.bounds_SL)[:, 0].cumsum()
        place = int(np.searchsorted(ends, position.cursors[0], "right"))
        return self.day_names[min(place, len(self.days) - 1)]

    def steps(self, position: Position) -> int:
        """Global batches from a position to its epoch's end: the same number for every rank."""
        left = self.lengths - np.array(position.cursors)
        return int(-(-left.max() // self.share))

    def batches(self, position: Position) -> Iterator[Batch]:
        """This rank's share of each global batch from `position` to its epoch's end, decoded ahead in a thread.

        Raises:
            UserError: a shard that cannot be read, or a position of another number of lanes.
        """
        if len(position.cursors) != self.lanes:
            raise UserError(
                f"the run reads {len(position.cursors)} lanes, train.lanes={self.lanes}: lanes cannot change."
            )
        if (np.array(position.cursors) > self.lengths).any():
            raise UserError("the run is at a row that the dataset does not have: its checkpoint is of another dataset.")
        return in_background(self._batches(position), self.ahead)

    def _batches(self, position: Position) -> Iterator[Batch]:
        order = np.arange(len(self.groups))
        if self.window:
            shuffle = np.random.default_rng([self.seed, position.epoch])
            order = np.concatenate([shuffle.permutation(day) for day in self.days])
        lanes = [(share, _Buffer(self._windows(order, position, share))) for share in self.shares]
        for _ in range(self.steps(position)):
            parts = []
            for share, lane in lanes:
                lane.skip(share.start)
                parts += lane.take(share.stop - share.start)
                lane.skip(self.share - share.stop)
            rows = Rows.concat(parts) if parts else lanes[0][1].nothing
            yield rows.batch(self.schema, self.size)

    def _windows(self, order: np.ndarray, position: Position, share: Share) -> Iterator[Rows]:
        """A lane's rows from its cursor on, window by window; blank ones in place of a window that has none of the share."""
        lane = share.lane
        length, cursor = int(self.lengths[lane]), position.cursors[lane]
        edges = self._edges(lane)
        decoded: dict[int, Rows] = {}
        for index, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            if stop <= cursor and stop < length:
                continue
            if self._rows_of(share, max(start, cursor)) == self._rows_of(share, stop):
                yield Rows.blank(self.schema, stop - max(start, cursor))
                continue
            pieces = self._pieces(order, lane, start, stop)
            decoded = {p.group: decoded.get(p.group) or self.decode(p.group) for p in pieces}
            parts = [decoded[p.group].slice(p.start, p.stop) for p in pieces]
            rows = Rows.concat(parts) if parts else self.decode(0).slice(0, 0)
            if self.window:
                shuffle = np.random.default_rng([self.seed, position.epoch, lane, index])
                rows = rows.take(torch.from_numpy(shuffle.permutation(len(rows))))
            yield rows.slice(min(max(cursor - start, 0), len(rows)), len(rows))

    def _rows_of(self, share: Share, row: int) -> int:
        """How many rows of a lane before `row` are a share's."""
        batches, rest = divmod(row, self.share)
        size = share.stop - share.start
        return batches * size + min(max(rest - share.start, 0), size)

    def _edges(self, lane: int) -> list[int]:
        """Where windows begin in a lane, and its end; none goes over the end of a day."""
        size, edges, begin = self.window or 1 << 14, [0], 0
        for rows in np.diff(self.bounds_SL)[:, lane].tolist():
            # Lanes begin with windows of unlike size, so that they do not all have to be refilled at the same step.
            edges += [*range(begin + max(1, size * (lane + 1) // self.lanes), begin + rows, size), begin + rows]
            begin += rows
        return edges

    def _pieces(self, order: np.ndarray, lane: int, start: int, stop: int) -> list[Piece]:
        """The parts of row groups that hold rows start .. stop - 1 of a lane."""
        pieces, begin = [], 0
        for first, bounds_L in zip(self.starts_S, self.bounds_SL, strict=True):
            low, high = first + bounds_L[lane], first + bounds_L[lane + 1]
            ours = max(low, low + start - begin), min(high, low + stop - begin)
            pieces += self._pieces_of(order, *map(int, ours)) if ours[0] < ours[1] else []
            begin += high - low
        return pieces

    def _pieces_of(self, order: np.ndarray, start: int, stop: int) -> list[Piece]:
        """The parts of row groups that hold rows start .. stop - 1 of the permuted split."""
        ends = np.cumsum(self.group_rows[order])
        pieces = []
        for place in range(int(np.searchsorted(ends, start, "right")), len(order)):
            begin = int(ends[place] - self.group_rows[order[place]])
            if begin >= stop:
                break
            pieces.append(Piece(int(order[place]), max(start - begin, 0), min(stop, int(ends[place])) - begin))
        return pieces

    def _open_shard(self, path: str) -> pq.ParquetFile:
        shard = next(shard for shard in self.shards if shard.path == path)
        return open_shard(self.dataset, shard, self.read_columns)

    def decode(self, group: int) -> Rows:
        """The rows of a row group. Raises UserError where it cannot be read."""
        path, index = self.groups[group]
        try:
            with self._reading:
                table = self._open(path).read_row_group(index, self.read_columns, use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
            what = f"{self.dataset.path / path}, row group {index}: cannot be read ({one_line(error)})"
            gone = isinstance(error, OSError) and error.errno is not None  # Arrow's own have none
            if gone or not self.max_corrupt:
                raise UserError(
                    f"{what}: the file changed after it was written. Restore it, run jobs.preprocess again, or leave its "
                    "rows out with train.corrupt=skip."
                ) from None
            return self._blank(group, what)
        for name, size in self.table_sizes.items():
            check_ids(self.dataset.path / path, name, table[name].combine_chunks(), size)
        rows = Rows.decode(table, self.schema)
        if offset := self.row_id_offsets[path]:
            rows.row_id_N += offset
        if self.keys is None:
            return rows
        key_NC, taken_N = self.keys.of(table, rows.row_id_N.numpy())
        rows = replace(rows, key_NC=torch.from_numpy(key_NC))
        return rows if taken_N is None else rows.take(torch.from_numpy(np.flatnonzero(taken_N)))

    def _blank(self, group: int, what: str) -> Rows:
        if group not in self.corrupt:
            self.corrupt.add(group)
            logger.warning(f"{what}: its rows are left out")
        lost = int(self.group_rows[list(self.corrupt)].sum())
        if lost > self.max_corrupt * self.rows:
            raise UserError(
                f"{what}: {lost:,} of {self.rows:,} rows cannot be read, more than train.max_corrupt={self.max_corrupt:g} "
                "allows. Restore the files, or run jobs.preprocess again."
            )
        return Rows.blank(self.schema, int(self.group_rows[group]))


class _Buffer:
    """Takes rows from a stream of windows, as many at a time as asked for."""

    def __init__(self, windows: Iterator[Rows]) -> None:
        self.windows, self.rows, self.used = windows, next(windows), 0

    @property
    def nothing(self) -> Rows:
        return self.rows.slice(0, 0)

    def take(self, count: int) -> list[Rows]:
        return [self.rows.slice(start, stop) for start, stop in self._spans(count)]

    def skip(self, count: int) -> None:
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


def in_background(items: Iterator[Batch], ahead: int) -> Iterator[Batch]:
    """The items, made in a thread up to `ahead` of their use; an error there is raised here."""
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(max(ahead, 1))
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # a thread's error would go unseen
            put(error)

    thread = threading.Thread(target=make, daemon=True, name="loader")
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
