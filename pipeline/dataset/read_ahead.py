"""Row groups of shards on a store: fetched by threads in the order in which they are decoded, within a limit of memory."""

import queue
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator

from features.parquet_limits import check_footer
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.shards import FOOTER_BYTES, FetchedShard, read_footer
from pipeline.storage.cache import DiskCache
from pipeline.storage.ranges import Range, read_ranges, requests_of

OPEN_SHARDS = 16  # the footer of one of many columns takes 20 MB; to open it costs a tenth of decoding a row group
THREADS = 4  # that fetch, each a row group at a time by several requests
PARSED = 8  # times its bytes that a footer takes
MOST_AHEAD = 64  # row groups, however small


def _local(path: str | Path) -> str | Path:
    if "://" in str(path):
        raise ValueError("a cache lies on a local disk: name a folder of this machine")
    return path


LocalFolder = Annotated[Path, BeforeValidator(lambda value: _local(value) if isinstance(value, str | Path) else value)]


@dataclass(frozen=True)
class Reading:
    """How shards on a store are read; those on a mounted file system are mapped instead.

    Attributes:
        ahead_bytes: memory of each process for row groups that are fetched before they are decoded, and the one that is.
        cache, cache_bytes: a folder of a local disk that keeps them, and what it may take; None: none.
        processes: that share the cache on this host.
    """

    ahead_bytes: int = 256 << 20
    cache: Path | None = None
    cache_bytes: int = 100 << 30
    processes: int = 1


class Fetched(NamedTuple):
    """A row group's needed columns, not yet in the shard's memory."""

    shard: FetchedShard
    parts: list[tuple[Range, bytes]]


class StoredGroups:
    """Fetches row groups of a dataset on a store, by way of the cache. Threads may share it.

    Args:
        columns: that are read.
    Raises:
        UserError: the cache cannot be written.
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str], reading: Reading) -> None:
        self.dataset, self.columns, self.reading = dataset, columns, reading
        self.cache = DiskCache(reading.cache, reading.cache_bytes, reading.processes) if reading.cache else None
        self.footers: OrderedDict[str, bytes] = OrderedDict()  # by shard, the last used at the end, as below
        self.opened: OrderedDict[str, FetchedShard] = OrderedDict()
        self.footer_bytes = 0  # of the longest
        self.shares = deque([1.0], maxlen=16)  # of the last row groups, how much of their bytes were fetched
        self.lock = threading.Lock()
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by shard: one reads its footer

    def fetch(self, shard: Shard, index: int) -> Fetched:
        """A row group, by number, once its entries in the footer have passed check_footer. Raises as open_shard."""
        with self.locks[shard.path]:
            footer = self._footer(shard)
        with self.lock:
            opened = self._open(shard, footer)
            check_footer(opened.footer, self.dataset.path / shard.path, shard.bytes, self.columns, groups=[index])
            ranges = requests_of(opened.ranges(self.columns, [index]))
        parts = [*zip(ranges, self._read(shard, ranges), strict=True)]
        self.shares.append(sum(len(content) for _, content in parts) / max(_bytes(shard, index), 1))
        return Fetched(opened, parts)

    def bytes_of(self, shard: Shard, index: int) -> int:
        """About how much memory a row group will take, with the footer of its shard."""
        return int(_bytes(shard, index) * max(self.shares)) + PARSED * self.footer_bytes

    def _footer(self, shard: Shard) -> bytes:
        with self.lock:
            if (footer := self.footers.pop(shard.path, None)) is not None:
                self.footers[shard.path] = footer
                return footer
        name = f"{shard.sha256}-footer"
        if self.cache is None or (footer := self.cache.get(name)) is None:
            guess = max(FOOTER_BYTES, self.footer_bytes * 9 // 8)  # those of other shards are much the same
            footer = read_footer(self.dataset.path / shard.path, shard.bytes, guess)
            if self.cache:
                self.cache.put(name, footer)
        with self.lock:
            self.footer_bytes = max(self.footer_bytes, len(footer))
            self.footers[shard.path] = footer
            while sum(map(len, self.footers.values())) > self.reading.ahead_bytes // 4:
                self.footers.popitem(last=False)
        return footer

    def _open(self, shard: Shard, footer: bytes) -> FetchedShard:
        opened = self.opened.pop(shard.path, None) or FetchedShard(self.dataset, shard, footer)
        self.opened[shard.path] = opened
        if len(self.opened) > OPEN_SHARDS:
            self.opened.popitem(last=False)
        return opened

    def _read(self, shard: Shard, ranges: Sequence[Range]) -> list[bytes]:
        path = self.dataset.path / shard.path
        if self.cache is None:
            return read_ranges(path, ranges)
        names = [f"{shard.sha256}-{start}-{stop}" for start, stop in ranges]
        found = {name: content for name in names if (content := self.cache.get(name)) is not None}
        missing = {name: span for name, span in zip(names, ranges, strict=True) if name not in found}
        for name, content in zip(missing, read_ranges(path, [*missing.values()]), strict=True):
            found[name] = content
            self.cache.put(name, content)
        return [found[name] for name in names]


def _bytes(shard: Shard, index: int) -> int:
    """About how many a row group has in the file, of all columns."""
    return shard.bytes * shard.row_groups[index] // max(shard.rows, 1)


class ReadAhead:
    """Row groups in a known order, fetched by threads before they are taken.

    Args:
        fetch: reads one. bytes_of: about how much memory it takes. order: in which they are taken.
        limit: of that memory, of those ahead and the one that was taken last; one is always fetched.
    Attributes:
        waited: seconds for which `take` has waited.
    """

    def __init__(
        self, fetch: Callable[[int], Fetched], bytes_of: Callable[[int], int], order: Iterator[int], limit: int
    ) -> None:
        self.fetch, self.bytes_of, self.order, self.limit = fetch, bytes_of, order, limit
        self.jobs: queue.SimpleQueue[tuple[int, Future[Fetched]] | None] = queue.SimpleQueue()
        self.ahead: deque[tuple[int, int, Future[Fetched]]] = deque()  # row group, bytes, and what will be there
        self.taken, self.waited, self.next = 0, 0.0, next(order, None)
        # Threads of an executor would be waited for when the process ends, as long as a store does not answer.
        for _ in range(THREADS):
            threading.Thread(target=_work, args=[self.jobs, fetch], daemon=True, name="read ahead").start()
        self._fill()

    def take(self, group: int) -> Fetched:
        """The next of the order. Raises as `fetch`."""
        if all(group != ahead for ahead, *_ in self.ahead):
            return self.fetch(group)
        while True:
            found, self.taken, future = self.ahead.popleft()
            if found == group:
                break
            future.cancel()
        self._fill()
        begin = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - begin

    def close(self) -> None:
        """Ends the threads, each after what it is fetching."""
        for *_, future in self.ahead:
            future.cancel()
        self.ahead.clear()
        for _ in range(THREADS):
            self.jobs.put(None)

    def _fill(self) -> None:
        used = self.taken + sum(size for _, size, _ in self.ahead)
        while self.next is not None and len(self.ahead) < MOST_AHEAD:
            size = self.bytes_of(self.next)
            if self.ahead and used + size > self.limit:
                return
            future: Future[Fetched] = Future()
            self.ahead.append((self.next, size, future))
            self.jobs.put((self.next, future))
            used, self.next = used + size, next(self.order, None)


def _work(jobs: "queue.SimpleQueue[tuple[int, Future[Fetched]] | None]", fetch: Callable[[int], Fetched]) -> None:
    while (job := jobs.get()) is not None:
        group, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(fetch(group))
        except BaseException as error:  # raised where it is taken
            future.set_exception(error)
        del job, future
