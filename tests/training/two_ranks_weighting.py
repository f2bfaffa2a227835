"""What two ranks do, for test_weighting.py: python -m jobs.launch --nproc-per-node=2 two_ranks_weighting.py FOLDER

FOLDER holds the dataset `data`; the runs are written beside it.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from tiny_training import on_each_rank
from two_ranks import stopped, trainer

# The placement of tables, and options: windows that end before and after the run stops.
RUNS = {
    "uncertainty": ("row_wise", {}),
    "gradnorm": ("table_wise", {}),
    "pcgrad": ("row_wise", {}),
    "dwa": ("table_wise", {"window": 4, "temperature": 0.1}),
    "famo": ("row_wise", {"lr": 0.1}),
    "stch": ("table_wise", {"warmup": 12, "mu": 0.3}),
    "nash_mtl": ("table_wise", {}),
    "rep_mtl": ("row_wise", {}),
    "flat_minima": ("table_wise", {}),
}
WITH_STATE = ("uncertainty", "gradnorm", "dwa", "famo", "stch")
STOP, STEPS = 9, 24  # an epoch has 13


def main(folder: Path) -> None:
    rank = dist.get_rank()
    for name, (placement, options) in RUNS.items():
        settings = {
            "weighting": {"name": name} | options,
            "sharding": {"default": [placement]},
            "max_steps": STEPS,
            "checkpoint_every": STOP,
        }
        made = trainer(folder, f"two-{name}", **settings)
        made.run_to_end()
        state = {n: v for n, v in made.learner.state()["model"].items() if not n.startswith("embeddings.")}
        torch.save(state, folder / f"{name}.{rank}.pt")
        if name in WITH_STATE:
            dist.barrier()
            if rank == 0:
                stopped(folder, f"two-{name}", f"two-{name}-resumed", STOP)
            dist.barrier()
            trainer(folder, f"two-{name}-resumed", **settings).run_to_end()


if __name__ == "__main__":
    on_each_rank(main)
