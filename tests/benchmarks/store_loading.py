"""How fast a rank's batches are made of a dataset on a store, and on this machine's disk.

    python tests/benchmarks/store_loading.py [--rows 200000] [--rounds 5] [--workers 0]

The rows are those of loading.py. They lie on disk, mapped and in the page cache, and on an S3 server on loopback. A reading is
an epoch of one rank with nothing that takes the batches. Two threads work on it: one decodes, and one (fsspec's) runs the
requests of those that wait for row groups ahead. Only the server has the rows in memory; on the line "cache full" they are in
the loader's cache on a local disk. The readings take turns in each round, since the machine's speed changes, and each ratio is
one within a round. "waiting" is the share of the time for which decoding waited for row groups; "CPU" is of this process, and
beside it of the server, which has the same cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import torch
from tabulate import tabulate

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "benchmarks")]

from loading import TABLE_ROWS, Sizes, cpu_seconds, write_dataset  # noqa: E402
from s3_server import S3Server  # noqa: E402

from pipeline.dataset.dataset import Dataset  # noqa: E402
from pipeline.dataset.loader import Loader  # noqa: E402
from pipeline.dataset.read_ahead import ReadAhead, Reading  # noqa: E402
from pipeline.storage.store_path import place  # noqa: E402

BATCH, LANES, WINDOW = 8192, 8, 16384


class Read(NamedTuple):
    """Of an epoch: rows a second, share of the time that decoding waited, CPU seconds of the rank and of the server."""

    rows_per_s: float
    waiting: float
    client: float
    server: float


@contextmanager
def server(folder: Path) -> Iterator[psutil.Process]:
    """The process of an S3 server that the environment names."""
    started = S3Server(folder).start()
    assert started.process is not None
    os.environ.update(started.env)
    try:
        yield psutil.Process(started.process.pid)
    finally:
        started.kill()


class TimedLoader(Loader):
    """A loader that adds up for how long its decoding waits for the store, of epochs that have ended; 0 with processes."""

    waited = 0.0

    @contextmanager
    def reading_ahead(self, order: Iterator[int]) -> Iterator[ReadAhead | None]:
        """As of a loader."""
        with super().reading_ahead(order) as ahead:
            yield ahead
        self.waited += ahead.waited if ahead else 0.0


def loader(dataset: Dataset, workers: int, reading: Reading) -> TimedLoader:
    """As a trainer's of one rank, ids compared with their tables too."""
    table_sizes: dict[str, int | None] = dict.fromkeys(dataset.schema.sparse, TABLE_ROWS)
    return TimedLoader(
        dataset, "train", BATCH, LANES, window=WINDOW, table_sizes=table_sizes, workers=workers, reading=reading
    )


def read(made: TimedLoader, epoch: int, process: psutil.Process) -> Read:
    """An epoch of batches."""
    before, waited = sum(process.cpu_times()[:2]), made.waited
    begin, cpu = time.perf_counter(), cpu_seconds(made)[1]
    rows = sum(int((batch.row_id_B >= 0).sum()) for batch in made.batches(made.start(epoch)))
    seconds = time.perf_counter() - begin
    served = sum(process.cpu_times()[:2]) - before
    return Read(rows / seconds, (made.waited - waited) / seconds, cpu_seconds(made)[1] - cpu, served)


def copied(dataset: Dataset, url: str) -> Dataset:
    """The same dataset on a store."""
    root = place(url)
    for file in sorted(dataset.path.rglob("*")):
        if file.is_file():
            (root / file.relative_to(dataset.path).as_posix()).write_bytes(file.read_bytes())
    return Dataset(root)


def compare(local: Dataset, stored: Dataset, cache: Path, workers: int, rounds: int, process: psutil.Process) -> str:
    """A line for each place that the rows lie in."""
    loaders = {
        "disk": loader(local, workers, Reading()),
        "S3": loader(stored, workers, Reading()),
        "S3, cache full": loader(stored, workers, Reading(cache=cache)),
    }
    readings: dict[str, list[Read]] = {name: [] for name in loaders}
    for epoch in range(rounds + 1):
        for name, made in loaders.items():
            found = read(made, epoch, process)
            if epoch:  # the first has filled the cache, and opened footers
                readings[name].append(found)
    lines = []
    for name, found in readings.items():
        pairs = zip(found, readings["disk"], strict=True)
        ratios = sorted(own.rows_per_s / first.rows_per_s for own, first in pairs)
        rate, waiting, client, served = (statistics.median(values) for values in zip(*found, strict=True))
        lines.append([name, rate, statistics.median(ratios), ratios[0], ratios[-1], 100 * waiting, client, served])
    for made in loaders.values():
        if made.decoders:
            made.decoders.close()
    headers = ["rows on", "rows/s", "x of disk", "least", "most", "waiting %", "CPU s", "server's CPU s"]
    return tabulate(lines, headers, floatfmt=("", ",.0f", ".3f", ".3f", ".3f", ".1f", ".2f", ".2f"))


def main(arguments: list[str] | None = None) -> None:
    """Writes the rows to both places, reads them in turns, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--row-group", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    sizes = Sizes(options.rows, options.row_group)
    with tempfile.TemporaryDirectory() as name, server(Path(name) / "s3") as process:
        local = write_dataset(Path(name) / "data", sizes)
        stored = copied(local, "s3://bucket/data")
        bytes_ = sum(shard.bytes for shard in local.shards("train"))
        print(f"{sizes.rows:,} rows of {bytes_ / sizes.rows:,.0f} bytes; row groups of {sizes.row_group:,}")
        print(compare(local, stored, Path(name) / "cache", options.workers, options.rounds, process))


if __name__ == "__main__":
    main()
