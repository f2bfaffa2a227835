"""A training loop in plain PyTorch, written well: what one has without taskfuse. It is not imported here.

    python tests/benchmarks/plain_trainer.py DATASET --model mmoe|ple [--dtype bf16] [--steps 60]

prints one JSON line; under torchrun with DDP over gloo, each rank with all tables, whose sparse gradients gloo gathers. A
step is: a batch from the loader, forward, backward, Adam on the dense part, Adagrad on the rows of the tables that it met.
Each step is timed and the median kept: a step slowed by another process moves a mean, not that.
"""

# Shapes: B rows of a batch, N rows of a window, F id columns, D numbers, T tasks.

import argparse
import json
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import workload as w
from plain_model import EXPERTS, PlainRanker
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

LABELS = tuple(f"label.{name}" for name in w.LABELS)  # as the dataset calls them
WINDOW = 16  # row groups that are shuffled together: 131,072 rows as jobs.preprocess writes them


class Rows(NamedTuple):
    """Of a batch."""

    id_BF: Tensor
    dense_BD: Tensor
    label_BT: Tensor


def columns(table: pa.Table, names: tuple[str, ...], pick_B: np.ndarray) -> Tensor:
    """Some rows of some columns, gathered from where Arrow holds them into one tensor, column after column in memory."""
    views = [table[name].chunk(0).to_numpy() for name in names]
    out = np.empty((len(names), len(pick_B)), views[0].dtype)
    for view, row_B in zip(views, out, strict=True):
        np.take(view, pick_B, out=row_B, mode="clip")  # the mode that needs no buffer; nothing is out of bounds
    return torch.from_numpy(out).t()


def batches(paths: list[Path], size: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Rows]:
    """One epoch: this rank's row groups in random order, a window of them shuffled row by row; ends with whole batches."""
    shuffle, files = np.random.default_rng(seed), [pq.ParquetFile(path, memory_map=True) for path in paths]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    order, left = shuffle.permutation(len(groups))[rank::ranks], None
    for first in range(0, len(order), WINDOW):
        read = [groups[i] for i in order[first : first + WINDOW]]
        parts = [file.read_row_group(i, [*w.CATS, *w.DENSES, *LABELS], use_threads=False) for file, i in read]
        table = pa.concat_tables([*([left] if left is not None else []), *parts]).combine_chunks()
        order_N = shuffle.permutation(len(table))
        whole = len(table) - len(table) % size
        for begin in range(0, whole, size):
            pick_B = np.sort(order_N[begin : begin + size])  # within a batch the order of memory is as good, and faster
            yield Rows(columns(table, w.CATS, pick_B), columns(table, w.DENSES, pick_B), columns(table, LABELS, pick_B))
        left = table.take(order_N[whole:])


def ahead(epochs: Callable[[int], Iterator[Rows]], count: int = 4) -> Iterator[Rows]:
    """Batches of one epoch after the other, made in a thread while the one before is learnt from."""
    made: queue.Queue[Rows] = queue.Queue(count)

    def make() -> None:
        epoch = 0
        while True:
            for batch in epochs(epoch):
                made.put(batch)
            epoch += 1

    threading.Thread(target=make, daemon=True).start()
    while True:
        yield made.get()


def steps(model: torch.nn.Module, ranker: PlainRanker, loader: Iterator[Rows]) -> Iterator[float]:
    """Trains; yields the seconds that each step waited for its batch."""
    tables = torch.optim.Adagrad(ranker.tables.parameters(), lr=0.02, eps=1e-8)
    adam = torch.optim.Adam(ranker.dense.parameters(), lr=1e-3, fused=True)
    while True:
        begin = time.perf_counter()
        rows = next(loader)
        waited = time.perf_counter() - begin
        tables.zero_grad()
        adam.zero_grad()
        model(*rows).backward()
        tables.step()
        adam.step()
        yield waited


def main() -> None:
    """Times the steps and prints the line, on one rank or many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", choices=EXPERTS, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ranker = PlainRanker(args.model, args.dtype == "bf16")
    model: torch.nn.Module = ranker
    if ranks > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(ranker, broadcast_buffers=False, gradient_as_bucket_view=True)
    paths = sorted((args.dataset / "train").glob("*.parquet"))
    loader = ahead(lambda epoch: batches(paths, w.BATCH, epoch, rank, ranks))
    trained, seconds, waited = steps(model, ranker, loader), [], 0.0
    for _ in islice(trained, args.warmup):
        pass
    for _ in range(args.steps):
        begin = time.perf_counter()
        waited += next(trained)
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        rows_per_s = w.BATCH * ranks / statistics.median(seconds)
        print(json.dumps({"rows_per_s": round(rows_per_s), "data_wait": waited / sum(seconds)}))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
