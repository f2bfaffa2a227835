"""How fast batches are made of a wide dataset, by decoding processes and by how its shards are written.

    python tests/benchmarks/loading.py [--rows 100000] [--workers 0 1 2 4] [--rounds 3] [--formats] [--profile]

The rows have 150 ids of Zipf's law, 50 bags of 5 ids on average, 50 numbers and 3 labels. A reading is an epoch of one rank
with nothing that takes the batches; processes are up before it. Its CPU seconds are those of the rank's process and of its
decoding processes; "of the rank's" is its own part of them, "per core" is rows a CPU second. All numbers of processes take
turns in a round, since the machine's speed changes; figures are medians over the rounds.

--formats reads a row group that is written in several ways instead, in one thread: CPU seconds of Arrow's decoding, and of
`Rows.decode` after it. --profile prints where the CPU seconds of one thread go. Nothing is kept.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tabulate import tabulate

from features.batch import Rows
from features.fit.encoders import arrow_schema
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset, commit
from pipeline.dataset.loader import Loader
from pipeline.ingest.steps.write import write_shard

IDS, BAGS, NUMBERS, TASKS = 150, 50, 50, 3
MEAN_LENGTH = 5  # of a bag
TABLE_ROWS = 1_000_000
LEVELS, PAGES = (1, 3, 9), (64 << 10, 1 << 20, 8 << 20)  # of zstd; bytes
NO_COUNTS = {"read": {}, "left_out": {}, "outcomes": {}, "dead_letters": {}, "letters": []}


@dataclass(frozen=True)
class Sizes:
    """Columns of the dataset, rows of it and of a row group."""

    rows: int
    row_group: int
    ids: int = IDS
    bags: int = BAGS
    numbers: int = NUMBERS

    def schema(self) -> Schema:
        """Of the rows."""
        return Schema.parse(
            {
                "source": {"files": "*.csv"},
                "dense": {f"x{i}": {} for i in range(self.numbers)},
                "categorical": {f"c{i}": {"hash": TABLE_ROWS} for i in range(self.ids)},
                "bag": {f"b{i}": {"hash": TABLE_ROWS} for i in range(self.bags)},
                "tasks": {f"t{i}": {"kind": "binary", "label": f"t{i}"} for i in range(TASKS)},
                "split": {"by": "hash", "key": "k", "valid": 0.1, "test": 0.1},
            },
            "wide.yaml",
        )

    def table(self, schema: Schema, first: int, rows: int) -> pa.Table:
        """Some encoded rows: half of the ids are among the first hundreds, a tenth is rare."""
        draw = np.random.default_rng(first)

        def ids(count: int, column: int) -> np.ndarray:
            rank = np.floor(TABLE_ROWS ** draw.random(count)).astype(np.int64)
            return (rank * 2_654_435_761 + column) % TABLE_ROWS  # as of a hash: frequent ids are no neighbours

        def bag(column: int) -> pa.Array:
            offset_N = np.append(0, draw.poisson(MEAN_LENGTH, rows).cumsum()).astype(np.int32)
            return pa.ListArray.from_arrays(offset_N, ids(int(offset_N[-1]), column))

        columns: dict[str, object] = {f"x{i}": draw.standard_normal(rows) for i in range(self.numbers)}
        columns |= {f"c{i}": ids(rows, i) for i in range(self.ids)} | {f"b{i}": bag(i) for i in range(self.bags)}
        columns |= {f"label.t{i}": (draw.random(rows) < 0.1).astype(np.float32) for i in range(TASKS)}
        columns |= {"weight": np.ones(rows), "event_time": np.arange(rows), "row_id": np.arange(first, first + rows)}
        return pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in arrow_schema(schema)})


def write_dataset(out: Path, sizes: Sizes, row_groups_a_shard: int = 4) -> Dataset:
    """Commits the rows as train split."""
    schema, staging = sizes.schema(), out.with_name("staging")
    (staging / "scratch").mkdir(parents=True)
    step = sizes.row_group * row_groups_a_shard
    shards = [
        write_shard(
            staging / "scratch" / str(at), staging, "train", schema,
            [sizes.table(schema, at, min(step, sizes.rows - at))], sizes.row_group,
        )
        for at in range(0, sizes.rows, step)
    ]  # fmt: skip
    commit(staging, out, schema, shards, NO_COUNTS)
    return Dataset(out)


def loader(dataset: Dataset, batch: int, lanes: int, workers: int) -> Loader:
    """As a trainer's of one rank, ids compared with their tables too."""
    table_sizes: dict[str, int | None] = dict.fromkeys(dataset.schema.sparse, TABLE_ROWS)
    window = max(131_072 // lanes, 1)
    return Loader(dataset, "train", batch, lanes, window=window, table_sizes=table_sizes, workers=workers)


def cpu_seconds(made: Loader) -> np.ndarray:
    """Of this process, and of it with the decoding ones, so far."""
    workers = made.decoders.workers if made.decoders else []
    times = [psutil.Process().cpu_times(), *(psutil.Process(worker.process.pid).cpu_times() for worker in workers)]
    seconds = [found.user + found.system for found in times]
    return np.array([seconds[0], sum(seconds)])


def read(made: Loader) -> tuple[int, float, float, float]:
    """Rows of an epoch, seconds on the clock, CPU seconds of this process and of all."""
    for _ in made.batches(made.start()):  # processes are up, and owe nothing once an epoch is over
        pass
    begin, cpu = time.perf_counter(), cpu_seconds(made)
    rows = sum(int((batch.row_id_B >= 0).sum()) for batch in made.batches(made.start(1)))
    return rows, time.perf_counter() - begin, *(cpu_seconds(made) - cpu).tolist()


def by_workers(dataset: Dataset, batch: int, lanes: int, workers: list[int], rounds: int) -> str:
    """A line for each number of processes."""
    loaders = {count: loader(dataset, batch, lanes, count) for count in workers}
    readings: dict[int, list[tuple[int, float, float, float]]] = {count: [] for count in workers}
    for _ in range(rounds):
        for count, made in loaders.items():
            readings[count].append(read(made))
    lines = []
    for count, found in readings.items():
        seconds, of_rank, cpu = (statistics.median(taken[n] / rows for rows, *taken in found) for n in range(3))
        pairs = zip(found, readings[workers[0]], strict=True)
        ratio = statistics.median(own[0] / own[1] * first[1] / first[0] for own, first in pairs)
        processes = len(made.decoders.workers) if (made := loaders[count]).decoders else 0
        lines.append([processes, 1 / seconds, ratio, 1e6 * cpu, 1e6 * of_rank, 1 / cpu])
        if made.decoders:
            made.decoders.close()
    headers = ["processes", "rows/s", "x", "CPU s a million rows", "of the rank's", "rows/s per core"]
    return tabulate(lines, headers, floatfmt=("", ",.0f", ".2f", ".1f", ".1f", ",.0f"))


def by_format(folder: Path, sizes: Sizes, rounds: int) -> str:
    """A line for each way of writing the same row group: the least of several CPU times, which nothing can lower."""
    schema, rows = sizes.schema(), sizes.row_group
    table = sizes.table(schema, 0, rows)
    ways = {
        f"zstd {level}, pages of {page >> 10} kB{', dictionaries' * dictionary}{f', {version}' * (version != '1.0')}": {
            "compression": "zstd", "compression_level": level, "data_page_size": page, "use_dictionary": dictionary,
            "data_page_version": version,
        }
        for level, page, dictionary, version in [
            *product(LEVELS, PAGES, [False], ["1.0"]), (1, 1 << 20, True, "1.0"), (1, 1 << 20, False, "2.0"),
        ]
    } | {name: {"compression": name, "use_dictionary": False} for name in ("lz4", "snappy", "none")}  # fmt: skip
    files = {}
    for number, (way, options) in enumerate(ways.items()):
        pq.write_table(table, folder / f"{number}", write_page_checksum=True, row_group_size=rows, **options)
        files[way] = pq.ParquetFile(folder / f"{number}", memory_map=True, page_checksum_verification=True)
    least = {way: [float("inf")] * 2 for way in files}
    for _ in range(rounds):
        for way, file in files.items():
            found, arrow = timed(lambda file=file: file.read_row_group(0, use_threads=False))
            _, decode = timed(lambda found=found: Rows.decode(found, schema))
            least[way] = [min(a, b) for a, b in zip(least[way], (arrow, decode), strict=True)]
    sizes_of = {way: (folder / f"{number}").stat().st_size / rows for number, way in enumerate(files)}
    lines = [[way, sizes_of[way], arrow * 1e6 / rows, decode * 1e6 / rows] for way, (arrow, decode) in least.items()]
    headers = ["written as", "bytes a row", "Arrow: CPU s a million rows", "Rows.decode"]
    return tabulate(lines, headers, floatfmt=("", ",.0f", ".2f", ".2f"))


def timed(do: Callable[[], object]) -> tuple[object, float]:
    """What a function returns, and its CPU seconds."""
    begin = time.process_time()
    return do(), time.process_time() - begin


def profile(dataset: Dataset, batch: int, lanes: int) -> None:
    """Prints where one thread spends its time."""
    made = loader(dataset, batch, lanes, 0)
    with cProfile.Profile(time.process_time) as found:
        for rows in made.rows_of(made.start(1), made.shares):
            rows.batch(made.schema, made.size)
    pstats.Stats(found).sort_stats("tottime").print_stats(25)


def main(arguments: list[str] | None = None) -> None:
    """Writes the rows, reads them, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--row-group", type=int, default=8192)
    parser.add_argument(
        "--columns", type=int, nargs=3, default=(IDS, BAGS, NUMBERS), metavar=("IDS", "BAGS", "NUMBERS")
    )
    parser.add_argument("--batch", type=int, default=8192, help="rows of the rank")
    parser.add_argument("--lanes", type=int, default=8, help="of the rank")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", action="store_true", help="by how shards are written")
    parser.add_argument("--profile", action="store_true", help="where one thread spends its time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    sizes = Sizes(options.rows, options.row_group, *options.columns)
    with tempfile.TemporaryDirectory() as name:
        if options.formats:
            print(by_format(Path(name), sizes, options.rounds))
            return
        dataset = write_dataset(Path(name) / "data", sizes)
        shards = dataset.shards("train")
        bytes_ = sum(shard.bytes for shard in shards) / sizes.rows
        print(f"{sizes.rows:,} rows of {bytes_:,.0f} bytes in {len(shards)} shards; row groups of {sizes.row_group:,}")
        if options.profile:
            profile(dataset, options.batch, options.lanes)
            return
        print(by_workers(dataset, options.batch, options.lanes, options.workers, options.rounds))


if __name__ == "__main__":
    main()
