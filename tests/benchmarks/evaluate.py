"""Throughput of the evaluator beside the bare forward pass: python tests/benchmarks/evaluate.py (make bench-evaluate).

The workload of workload.py with a user, a device, a country, a position and a time in each row; all rows are scored by the
model `bench_mmoe`. Contenders, in turn within each round:

  forward          batches that are in memory, nothing but the model: not what any evaluation can reach
  read + forward   the same with reading and decoding, as an evaluation has to
  metrics alone    `jobs.evaluate` without slices and intervals
  intervals        with intervals: 100 buckets by user
  slices           and with slices: device, country, position by edges, device x country, day and hour
  all              and with cold start of 16 features, GAUC and NDCG by user: all that is on by default

Prints rows/s and ratios to `read + forward`, the median of the rounds; keeps them in results/evaluate.json. --profile prints
where the time of `all` goes.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch
import workload
from tabulate import tabulate
from train_runs import CONF, RESULTS, machine, preprocess, run

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.scorer import Scorer
from pipeline.malloc import tune_malloc
from pipeline.run import checkpoint
from pipeline.run.run import Run

BATCH = 8192
KEEP = ("user", "device", "country", "position")
SLICES = ["device", "country", {"column": "position", "edges": [2, 4, 8]}, ["device", "country"]]
FORWARD, READ, METRICS, ALL = "forward", "read + forward", "metrics alone", "all"
INTERVALS, SLICED = "intervals", "slices"


def main() -> None:
    """Runs all contenders in turn, prints a table, keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=workload.ROWS)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune_malloc()
    with tempfile.TemporaryDirectory() as name:
        contenders = prepare(Path(name), options.rows)
        for contender in contenders.values():
            contender()
        if options.profile:
            profile(contenders[ALL])
            return
        rounds = [
            {key: options.rows / timed(contender) for key, contender in contenders.items()}
            for _ in range(options.rounds)
        ]
    rate = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    ratio = {key: statistics.median(r[key] / r[READ] for r in rounds) for key in rounds[0]}
    spread = {key: [min(r[key] / r[READ] for r in rounds), max(r[key] / r[READ] for r in rounds)] for key in rounds[0]}
    lines = [[key, rate[key], ratio[key], "{:.2f} .. {:.2f}".format(*spread[key])] for key in rate]
    print(tabulate(lines, ["", "rows/s", f"x {READ}", "rounds"], floatfmt=("", ",.0f", ".3f", "")))
    found = {
        "rows_per_s": rate,
        f"x {READ}": ratio,
        "threads": options.threads,
        "rows": options.rows,
        "machine": machine(),
    }
    (RESULTS / "evaluate.json").write_text(json.dumps(found, indent=1) + "\n")


def prepare(folder: Path, count: int) -> dict[str, Callable[[], object]]:
    """The contenders, each a function that scores all rows."""
    write_raw(folder / "raw", count)
    keys = [
        f"+data.schema.keep=[{','.join(KEEP)}]",
        "+data.schema.event_time=time",
        "+data.schema.source.types.position=int",
    ]
    data = preprocess(folder / "raw", folder / "data", *keys)
    arguments = [
        "-m",
        "jobs.train",
        CONF,
        f"dataset={data}",
        "model=bench_mmoe",
        f"run={folder / 'run'}",
        "train.max_steps=20",
    ]
    run(arguments)
    trained, dataset = Run(folder / "run"), Dataset(data)
    [step] = checkpoint.steps(trained.checkpoints)
    measures = {
        METRICS: MeasureConfig(cold_start=False, by_time=[], buckets=1, cluster_by="row"),
        INTERVALS: MeasureConfig(cold_start=False, by_time=[], cluster_by="user", group="row"),
        SLICED: MeasureConfig(slices=SLICES, cold_start=False, cluster_by="user", group="row"),
        ALL: MeasureConfig(slices=SLICES, cluster_by="user"),
    }
    scorers = {name: Scorer(trained, dataset, "all", BATCH, measure) for name, measure in measures.items()}
    plain = scorers[METRICS]
    plain.metrics(step)  # loads the checkpoint
    ranker = plain.ranker
    readers = [SplitReader(dataset, split, BATCH) for split, rows in dataset.manifest.rows.items() if rows]
    in_memory = [batch for reader in readers for batch in reader.batches()]

    @torch.inference_mode()
    def forward() -> None:
        for batch in in_memory:
            ranker(batch)

    @torch.inference_mode()
    def read() -> None:
        for reader in readers:
            for batch in reader.batches():
                ranker(batch)

    return {FORWARD: forward, READ: read, **{name: partial(scorer.evaluate, step) for name, scorer in scorers.items()}}


def write_raw(folder: Path, count: int, files: int = 4) -> None:
    """The workload's rows with columns to slice by, as CSV files."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(7)
    cdf = np.cumsum(1 / np.arange(1, count // 8 + 1) ** 0.7)
    more = {
        "user": np.char.add("u", np.searchsorted(cdf, draw.random(count) * cdf[-1]).astype(str)),
        "device": np.array(["phone", "tablet", "desktop", "tv", "car"])[
            draw.choice(5, count, p=[0.6, 0.1, 0.2, 0.05, 0.05])
        ],
        "country": np.char.add("c", np.minimum(draw.zipf(1.4, count), 60).astype(str)),
        "position": draw.integers(1, 21, count),
        "time": np.sort(draw.integers(1_795_000_000, 1_795_000_000 + 2 * 86_400, count)),
    }
    table = pa.table({**workload.rows(count=count), **more})
    size = -(-count // files)
    for part in range(files):
        pa.csv.write_csv(table.slice(part * size, size), folder / f"rows-{part}.csv")


def timed(contender: Callable[[], object]) -> float:
    """Seconds of wall clock."""
    begin = time.perf_counter()
    contender()
    return time.perf_counter() - begin


def profile(contender: Callable[[], object]) -> None:
    """Prints the functions of this process that take longest."""
    with cProfile.Profile() as profiler:
        contender()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
