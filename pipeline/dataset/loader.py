"""The loader: global batches that depend on dataset, seed, epoch and batch size alone, never on how many ranks share them.

An epoch permutes the row groups of a split and cuts their rows, end to end, into L lanes of equal length. A lane is
read in order, shuffled within windows. Every global batch takes the same number of rows from each lane, lane after lane,
and a lane that has ended leaves its places empty. So the position of a run is one cursor a lane, whatever the number R of
ranks is. Where R divides L, rank r owns the lanes l with l mod R = r; else it has the places B r // R .. B (r + 1) // R - 1
of a batch of B rows, and reads the lanes that these lie in. Of a dataset of several days each day is permuted and cut by
itself, and a lane reads its part of one day after that of the day before.
"""

import errno
import heapq
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features.batch import Batch, Rows
from features.errors import UserError, one_line
from features.regular_files import mounted
from features.schema.schema import Split
from pipeline.dataset import decoding
from pipeline.dataset.background import delayed, in_background, pinned
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.lanes import Buffer, Piece, Share, Window, blocks, check_sizes, pieces_of, shares
from pipeline.dataset.read_ahead import OPEN_SHARDS, Fetched, ReadAhead, Reading, StoredGroups
from pipeline.dataset.shards import check_groups, check_ids, open_shard

logger = logging.getLogger(__name__)
DELAY = 2  # batches of a store: a rank's message to the others is read one step later
MOST_SLOTS = 64  # parts of batches that a decoding process makes ahead


class StoreGoneError(UserError):
    """The store that a dataset lies on has not answered for longer than it may, or refuses, as once a token has expired."""


@dataclass
class Position:
    """How far a run has read: rows consumed of each lane in an epoch."""

    epoch: int = 0
    cursors: list[int] = field(default_factory=list)


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
        workers: processes that decode, each some of the rank's lanes (pipeline.dataset.decoding); 0: a thread of this one.
        device: which batches are for; those for a GPU are in page-locked memory.
        reading: of a dataset on a store; each decoding process reads by itself.
    Attributes:
        gone: set DELAY batches before `batches` raises it: while all ranks still have some, they can agree to save.
        on_corrupt: what is done with a row group that is left out, in place of `leave_out`.

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
        workers: int = 0,
        device: torch.device | None = None,
        reading: Reading = Reading(),  # noqa: B008
    ) -> None:
        check_sizes(batch_size, lanes, ranks)
        self.dataset, self.schema, self.shards = dataset, dataset.schema, dataset.shards(split)
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.share, self.size = batch_size // lanes, -(-batch_size // ranks)
        self.shares = shares(batch_size, lanes, rank, ranks)
        self.window, self.ahead, self.device = window, ahead, device or torch.device("cpu")
        self.max_corrupt, self.corrupt = max_corrupt, set[int]()
        self.on_corrupt: Callable[[int, str], None] | None = None
        self.table_sizes, self.keys = table_sizes or {}, keys
        groups = [(shard, index, rows) for shard in self.shards for index, rows in enumerate(shard.row_groups)]
        self.groups = [(shard.path, index) for shard, index, _ in groups]
        self.by_path = {shard.path: shard for shard in self.shards}
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
        self.day_ends_S = np.diff(self.bounds_SL[:, :2])[:, 0].cumsum()  # of the first lane
        self.read_columns = [*self.schema.columns, *(f"label.{t}" for t in self.schema.tasks), "weight", "row_id"]
        self.read_columns = [*dict.fromkeys((*self.read_columns, *(keys.columns if keys else ())))]
        self.stored = None if mounted(dataset.path) else StoredGroups(dataset, self.read_columns, reading)
        self.gone: StoreGoneError | None = None
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._reading = threading.Lock()  # two threads that read one ParquetFile crash the process
        self._decoded: WeakValueDictionary[int, Rows] = WeakValueDictionary()
        self.decoders: decoding.Decoders | None = None
        if workers:
            if keys:
                raise ValueError("decoding processes make no keys")
            source = partial(
                Loader, dataset.only(None), split, batch_size, lanes, seed, rank, ranks, window,
                max_corrupt=max_corrupt, table_sizes=table_sizes, reading=reading,
            )  # fmt: skip
            parts = decoding.split(self.shares, workers)
            # While a process decodes a row group the others go on, with as many rows ahead.
            slots = min(max(ahead, int(self.group_rows.max()) * len(parts) // self.size + 2), MOST_SLOTS)
            self.decoders = decoding.Decoders(source, parts, slots)

    def start(self, epoch: int = 0) -> Position:
        """The position at an epoch's begin."""
        return Position(epoch, [0] * self.lanes)

    def after(self, position: Position, steps: int = 1) -> Position:
        """The position `steps` global batches further on in the same epoch."""
        cursors = np.minimum(np.array(position.cursors) + steps * self.share, self.lengths)
        return Position(position.epoch, cursors.tolist())

    def day(self, position: Position) -> str:
        """The day that the next batch begins in, by its first lane; the empty text where there are no days."""
        place = int(np.searchsorted(self.day_ends_S, position.cursors[0], "right"))
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
        made = in_background(pinned(self._batches(position), self.device), self.ahead)
        return made if self.stored is None else delayed(made, DELAY, self._failed)

    def _failed(self, error: UserError) -> None:
        self.gone = error if isinstance(error, StoreGoneError) else None

    def _batches(self, position: Position) -> Iterator[Batch]:
        rows = self.rows_of(position, self.shares)
        if self.decoders:
            rows = self.decoders.rows(position, self.steps(position), self.leave_out)
        for some in rows:
            yield some.batch(self.schema, self.size)

    def rows_of(self, position: Position, shares: Sequence[Share]) -> Iterator[Rows]:
        """Of each global batch from `position` on the rows of some shares, one after the other. Raises UserError."""
        order = np.arange(len(self.groups))
        if self.window:
            shuffle = np.random.default_rng([self.seed, position.epoch])
            order = np.concatenate([shuffle.permutation(day) for day in self.days])
        end_G = np.cumsum(self.group_rows[order])
        with self.reading_ahead(self._demanded(order, end_G, position, shares)) as ahead:
            lanes = [(share, Buffer(self._windows(order, end_G, position, share, ahead))) for share in shares]
            for _ in range(self.steps(position)):
                parts = []
                for share, lane in lanes:
                    lane.skip(share.start)
                    parts += lane.take(share.stop - share.start)
                    lane.skip(self.share - share.stop)
                yield Rows.concat(parts) if parts else lanes[0][1].nothing

    @contextmanager
    def reading_ahead(self, order: Iterator[int]) -> Iterator[ReadAhead | None]:
        """Within it row groups are fetched from a store in the order in which `decode` will take them; else None."""
        if self.stored is None:
            yield None
            return
        ahead = ReadAhead(self._fetch, self._bytes_of, order, self.stored.reading.ahead_bytes)
        try:
            yield ahead
        finally:
            ahead.close()

    def _fetch(self, group: int) -> Fetched:
        assert self.stored is not None
        path, index = self.groups[group]
        return self.stored.fetch(self.by_path[path], index)

    def _bytes_of(self, group: int) -> int:
        assert self.stored is not None
        path, index = self.groups[group]
        return self.stored.bytes_of(self.by_path[path], index)

    def _demanded(
        self, order: np.ndarray, end_G: np.ndarray, position: Position, shares: Sequence[Share]
    ) -> Iterator[int]:
        """The row groups that `rows_of` decodes, in its order: that of the steps, and of the lanes in a step."""

        def blocks_of(number: int, share: Share) -> Iterator[tuple[int, int, list[Piece]]]:
            cursor = position.cursors[share.lane]
            for count, (is_needed, block) in enumerate(self._blocks(end_G, position, share)):
                step = (block[0].start - cursor) // self.share if count else -1  # lanes begin with their first block
                if is_needed:
                    yield step, number, pieces_of(block, order, end_G)

        current: list[set[int]] = [set() for _ in shares]  # row groups of each lane's block, which others share
        for _, number, pieces in heapq.merge(*(blocks_of(number, share) for number, share in enumerate(shares))):
            groups = [piece.group for piece in pieces]
            yield from (group for group in groups if not any(group in others for others in current))
            current[number] = {*groups}

    def _blocks(self, end_G: np.ndarray, position: Position, share: Share) -> Iterator[tuple[bool, list[Window]]]:
        """A lane's windows from its cursor on, in blocks, and whether a block has rows of the share."""
        lane, cursor = share.lane, position.cursors[share.lane]
        left = (w for w in self._lane_windows(lane) if w.stop > cursor or w.stop == self.lengths[lane])
        needed = groupby(left, lambda w: self._before(share, max(w.start, cursor)) < self._before(share, w.stop))
        return ((is_needed, block) for is_needed, windows in needed for block in blocks(windows, end_G))

    def _windows(
        self, order: np.ndarray, end_G: np.ndarray, position: Position, share: Share, ahead: ReadAhead | None
    ) -> Iterator[Rows]:
        """A lane's rows from its cursor on, window by window; blank ones in place of a window that has none of the share.

        Args:
            order: the row groups, permuted. end_G: where each ends.
        """
        lane, cursor = share.lane, position.cursors[share.lane]
        decoded: dict[int, Rows] = {}
        for is_needed, block in self._blocks(end_G, position, share):
            start, stop = block[0].start, block[-1].stop
            if not is_needed:
                yield Rows.blank(self.schema, stop - max(start, cursor))
                continue
            pieces = pieces_of(block, order, end_G)
            decoded = {p.group: self._shared(p.group, ahead) for p in pieces}  # which the last block's may be among
            parts = [decoded[p.group].slice(p.start, p.stop) for p in pieces]
            rows = Rows.concat(parts)
            used = min(max(cursor - start, 0), len(rows))
            if self.window:
                shuffled = [w.start - start + self._permutation(position.epoch, lane, w) for w in block]
                yield rows.take(torch.from_numpy(np.concatenate(shuffled)[used:]))
            else:
                yield rows.slice(used, len(rows))

    def _permutation(self, epoch: int, lane: int, window: Window) -> np.ndarray:
        shuffle = np.random.default_rng([self.seed, epoch, lane, window.index])
        return shuffle.permutation(window.stop - window.start)

    def _shared(self, group: int, ahead: ReadAhead | None) -> Rows:
        """The rows of a row group, decoded once for all lanes that are at it."""
        rows = self._decoded.get(group)
        if rows is None:
            rows = self._decoded[group] = self.decode(group, ahead)
        return rows

    def _before(self, share: Share, row: int) -> int:
        """How many rows of a lane before `row` are a share's."""
        batches, rest = divmod(row, self.share)
        size = share.stop - share.start
        return batches * size + min(max(rest - share.start, 0), size)

    def _lane_windows(self, lane: int) -> Iterator[Window]:
        """The windows of a lane; none goes over the end of a day."""
        size, begin, index = self.window or 1 << 14, 0, 0
        bounds = (self.starts_S[:, None] + self.bounds_SL[:, lane : lane + 2]).tolist()
        for low, high in bounds:
            # Lanes begin with windows of unlike size, so that they do not all have to be refilled at the same step.
            edges = [0, *range(max(1, size * (lane + 1) // self.lanes), high - low, size), high - low]
            for start, stop in zip(edges, edges[1:], strict=False):
                yield Window(index, begin + start, begin + stop, low + start)
                index += 1
            begin += high - low

    def _open_shard(self, path: str) -> tuple[Shard, pq.ParquetFile]:
        shard = self.by_path[path]
        return shard, open_shard(self.dataset, shard, self.read_columns, groups=[])

    def _table(self, group: int, ahead: ReadAhead | None) -> pa.Table:
        """A row group, once it is checked. Raises as open_shard."""
        path, index = self.groups[group]
        if self.stored is None:
            with self._reading:
                shard, file = self._open(path)
                check_groups(self.dataset, shard, file.metadata, self.read_columns, [index])
                return file.read_row_group(index, self.read_columns, use_threads=False)
        fetched, parts = ahead.take(group) if ahead else self._fetch(group)
        with self._reading, fetched.holding(parts) as content:
            check_groups(self.dataset, fetched.shard, fetched.footer, self.read_columns, [index], content)
            return fetched.file.read_row_group(index, self.read_columns, use_threads=False)

    def decode(self, group: int, ahead: ReadAhead | None = None) -> Rows:
        """The rows of a row group. Raises UserError where it cannot be read.

        Args:
            ahead: what `reading_ahead` gives, where row groups are decoded in that order.
        """
        path, index = self.groups[group]
        try:
            table = self._table(group, ahead)
        except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8 is a ValueError
            if self.stored and isinstance(error, OSError) and error.errno in (errno.ETIMEDOUT, errno.EACCES):
                until = "it does" if error.errno == errno.ETIMEDOUT else "its credentials are renewed"
                raise StoreGoneError(
                    f"{self.dataset.path / path}: {error.strerror}. The same command resumes once {until}."
                ) from None
            what = f"{self.dataset.path / path}, row group {index}: cannot be read ({one_line(error)})"
            gone = isinstance(error, OSError) and error.errno is not None  # Arrow's own have none
            if gone or not self.max_corrupt:
                raise UserError(
                    f"{what}: the file changed after it was written. Restore it, run jobs.preprocess again, or leave its "
                    "rows out with train.corrupt=skip."
                ) from None
            (self.on_corrupt or self.leave_out)(group, what)
            return Rows.blank(self.schema, int(self.group_rows[group]))
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

    def leave_out(self, group: int, what: str) -> None:
        """Counts a row group that cannot be read, and logs it. Raises UserError where that is one too many."""
        if group not in self.corrupt:
            self.corrupt.add(group)
            logger.warning(f"{what}: its rows are left out")
        lost = int(self.group_rows[list(self.corrupt)].sum())
        if lost > self.max_corrupt * self.rows:
            raise UserError(
                f"{what}: {lost:,} of {self.rows:,} rows cannot be read, more than train.max_corrupt={self.max_corrupt:g} "
                "allows. Restore the files, or run jobs.preprocess again."
            )
