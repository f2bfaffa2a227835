"""What no trainer of the workload can do without: the bytes of its tables' rows and its matrix products.

    python tests/benchmarks/floor.py --model mmoe|ple [--dtype bf16] [--steps 30]

prints one JSON line; under torchrun all ranks work at once, as training does, and share the tables between them. Seconds of
a batch = bytes of the rows that it touches / rate of a copy + FLOPs / rate of the fastest products found; the rates are
measured here. A copy in order is faster than rows at random places, so that no table can beat it; what is looked up is not
counted on its way to the dense part, nor are activations, losses, the dense optimiser and the data.
"""

# Shapes: B rows of all ranks, F id columns, W width of an embedding.

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import workload as w
from matrix_products import Product, floor

FLOAT = 4  # bytes; tables are fp32 throughout
SAMPLE = 10  # batches


def table_bytes(id_BF: np.ndarray, width: int) -> int:
    """Of one batch, each row that it touches counted once, whatever cache or kernel there is.

    Forward: read the row. Backward with row-wise Adagrad: read and write the row and its one momentum.
    """
    touched = sum(len(np.unique(column)) for column in id_BF.T)
    return touched * (3 * width + 2) * FLOAT


def products(model: str, rows: int) -> list[Product]:
    """The dense part's for `rows` rows: the first layer of all experts as one product, all gates as one, the rest batched.

    A task of PLE has gates only for the experts that it sees. Mixing them is not counted.
    """
    mmoe, (hidden, out) = model == "mmoe", w.EXPERT_DIMS
    experts = w.MMOE_EXPERTS if mmoe else w.TASKS * w.PLE_OWN + w.PLE_SHARED
    seen = w.MMOE_EXPERTS if mmoe else w.PLE_OWN + w.PLE_SHARED
    return [
        Product(1, rows, w.IN_DIM, experts * hidden),
        Product(experts, rows, hidden, out),
        Product(1, rows, w.IN_DIM, w.TASKS * seen),
        Product(w.TASKS, rows, out, w.TOWER_DIM),
        Product(w.TASKS, rows, w.TOWER_DIM, 1),
    ]


def flops(made: list[Product]) -> int:
    """Multiplications and additions of forward and backward: y = a b, g b' and a' g, each as long as the other two."""
    return sum(3 * 2 * p.count * p.rows * p.inner * p.outer for p in made)


def median_seconds(run: Callable[[], object], times: int) -> float:
    """On the clock, as trainers are timed; all ranks begin together."""
    run()
    if dist.is_initialized():
        dist.barrier()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def copy_rate(times: int) -> float:
    """Bytes read and written a second by a copy as large as the tables."""
    source = torch.ones(sum(w.TABLE_ROWS), w.WIDTH)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), times)


def batch_bytes(ranks: int) -> float:
    """`table_bytes` of a rank's share of a global batch: mean of a few, and each rank has its part of the tables."""
    columns = w.rows(count=SAMPLE * ranks * w.BATCH)
    id_NF = np.stack([columns[name] for name in w.CATS], 1)
    return statistics.mean(table_bytes(id_BF, w.WIDTH) for id_BF in np.split(id_NF, SAMPLE)) / ranks


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mmoe", "ple"), required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    dtype, bytes_ = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], batch_bytes(ranks)
    made = products(args.model, w.BATCH)
    rate, dense_s = copy_rate(args.steps), median_seconds(floor(made, dtype, "cpu"), args.steps)
    slowest = torch.tensor([bytes_ / rate, dense_s])
    if ranks > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.destroy_process_group()
    tables_s, dense_s = slowest.tolist()
    if rank == 0:
        rows_per_s = w.BATCH * ranks / (tables_s + dense_s)
        line = {"rows_per_s": round(rows_per_s), "tables_s": tables_s, "products_s": dense_s}
        line |= {"bytes": round(bytes_), "bytes_per_s": round(bytes_ / tables_s)}
        print(json.dumps(line | {"flops": flops(made), "flops_per_s": round(flops(made) / dense_s)}))


if __name__ == "__main__":
    main()
