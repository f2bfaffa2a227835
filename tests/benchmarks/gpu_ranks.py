"""One rank of gpu.py's section on two GPUs: gpu_ranks.py DATASET RUN [--small], under jobs.launch.

The rows of a rank stay the same: 16,384 of the wide schema. Rank 0 prints the mean of the ranks' figures as one JSON line.
"""

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "training")]

import torch.distributed as dist  # noqa: E402
from gpu_probes import take  # noqa: E402
from gpu_sections import LANES, configuration, work  # noqa: E402

from pipeline.dataset.dataset import Dataset  # noqa: E402
from pipeline.dataset.loader import Loader  # noqa: E402
from pipeline.training.parallel import process_group  # noqa: E402
from pipeline.training.train import prepare  # noqa: E402


def main() -> None:
    """Measures and prints."""
    data, run, small = Path(sys.argv[1]), Path(sys.argv[2]), "--small" in sys.argv
    device = process_group.start()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = (64 if small else 16_384) * ranks
    trainer = prepare(configuration(data, run, "mmoe", batch_size=rows, decode_workers=0), None, device)
    batches = work.batches(Loader(Dataset(data), "train", rows, LANES, 0, rank, ranks), 2)
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    figures = take(trainer, batches, *((1, 2) if small else (8, 24)))
    of_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_ranks, figures)
    if rank == 0:
        print(json.dumps({key: sum(each[key] for each in of_ranks) / ranks for key in figures}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
