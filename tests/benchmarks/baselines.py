"""What taskfuse is measured against: rows a second of one process on the workload, taskfuse not imported.

    python tests/benchmarks/baselines.py loop|rechub --model mmoe|ple [--threads 1] [--steps 60] [--dtype bf16]

prints one JSON line. Each step is timed and the median kept: a step slowed by another process moves a mean, not that.
"""
# Shapes: B rows, N rows of the data, F id columns, D width, E experts, H hidden, K expert output, T tasks.

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import workload as w
from plain_model import EXPERTS, Dense, dense_loss
from torch import Tensor


def measure(steps: Iterator[object], count: int, warmup: int) -> float:
    """Take `warmup` items unwatched, then `count` more; return the median seconds of one."""
    seconds = []
    for _ in islice(steps, warmup):
        pass
    for _ in range(count):
        start = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def loop(model: str, steps: int, warmup: int, dtype: torch.dtype) -> float:
    """A training loop without a framework, as written in an afternoon; returns rows a second.

    As plain_trainer.py, but its rows lie in memory and its tables in fbgemm: one call looks up all of them (fp32), and its
    backward has exact row-wise Adagrad inside.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    columns = {name: torch.from_numpy(values) for name, values in w.rows().items()}
    id_NF, dense_ND, label_NT = (torch.stack([columns[n] for n in names], 1) for names in (w.CATS, w.DENSES, w.LABELS))
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, w.WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU) for size in w.TABLE_ROWS],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.02,
        eps=1e-8,
    )
    tables.init_embedding_weights_uniform(-0.01, 0.01)
    dense_part = Dense(model)
    adam = torch.optim.Adam(dense_part.parameters(), lr=1e-3)
    offsets = torch.arange(w.BATCH * len(w.CATS) + 1)  # one id a row and column

    def batches() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(w.ROWS).split(w.BATCH)[:-1]  # the last one is short

    def train() -> Iterator[float]:
        for pick_B in batches():
            id_BF, dense_BD, label_BT = (part.index_select(0, pick_B) for part in (id_NF, dense_ND, label_NT))
            x_BD = torch.cat((tables(id_BF.t().reshape(-1), offsets), dense_BD), 1)
            loss = dense_loss(dense_part, x_BD, label_BT, dtype == torch.bfloat16)
            adam.zero_grad()
            loss.backward()
            adam.step()
            yield loss.item()

    return w.BATCH / measure(train(), steps, warmup)


def rechub(model: str, steps: int, warmup: int, dtype: torch.dtype) -> float:
    """torch-rechub's MMOE or PLE, DataGenerator and MTLTrainer as in its examples; returns rows a second.

    Timed is MTLTrainer.train_one_epoch with its default Adam, on the shuffling DataLoader (no workers) which its
    DataGenerator makes over numpy columns. The trainer reports no times, so the loader is handed over as an iterator
    that notes when each batch is ready and ends early: from one batch to the next is one whole step (forward, backward,
    Adam, .item() of the losses, drawing and collating the next). Nothing of torch-rechub is patched. Its MLPs have
    batch normalisation, its tables dense gradients and Adam: its own way to these sizes, not the same arithmetic.
    Needs requirements.txt, which `make .venv/rechub` installs apart from the environment: PYTHONPATH=.venv/rechub.
    """
    if dtype != torch.float32:
        raise SystemExit("rechub: MTLTrainer has no bf16; use --dtype fp32")
    import numpy as np
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, PLE
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    columns = w.rows()
    x = {name: columns[name] for name in (*w.CATS, *w.DENSES)}
    y = np.stack([columns[name] for name in w.LABELS], 1)
    features = [SparseFeature(name, size, w.WIDTH) for name, size in zip(w.CATS, w.TABLE_ROWS, strict=True)]
    features += [DenseFeature(name) for name in w.DENSES]
    kinds = ["classification"] * w.TASKS
    experts, towers = {"dims": [*w.EXPERT_DIMS]}, [{"dims": [w.TOWER_DIM]}] * w.TASKS
    if model == "mmoe":
        net = MMOE(features, kinds, w.MMOE_EXPERTS, experts, towers)
    else:
        net = PLE(features, kinds, 1, w.PLE_OWN, w.PLE_SHARED, experts, towers)
    head = {name: values[: w.BATCH] for name, values in x.items()}
    head_y = y[: w.BATCH]
    loader, _, _ = DataGenerator(x, y).generate_dataloader(head, head_y, head, head_y, batch_size=w.BATCH)
    ready: list[float] = []

    def timed() -> Iterator[object]:
        while True:
            for batch in islice(loader, w.ROWS // w.BATCH):  # without the short last one
                ready.append(time.perf_counter())
                if len(ready) > warmup + steps:
                    return
                yield batch

    with contextlib.redirect_stdout(io.StringIO()) as sink, contextlib.redirect_stderr(sink):  # its progress bar
        MTLTrainer(net, kinds).train_one_epoch(timed())
    return w.BATCH / statistics.median(b - a for a, b in zip(ready[warmup:], ready[warmup + 1 :], strict=False))


Baseline = Callable[[str, int, int, torch.dtype], float]
BASELINES: dict[str, Baseline] = {"loop": loop, "rechub": rechub}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("--model", choices=EXPERTS, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(args.threads):  # OpenMP reads it once, when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    try:
        rows_per_s = BASELINES[args.name](args.model, args.steps, args.warmup, dtype)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{args.name}: {error}: see {Path(__file__).with_name('requirements.txt')}") from None
    line = {"name": args.name, "model": args.model, "rows_per_s": round(rows_per_s)}
    line |= {"median_step_s": round(w.BATCH / rows_per_s, 5), "threads": args.threads, "dtype": args.dtype}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
