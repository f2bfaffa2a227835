"""What some ranks do, for test_search_runs.py: python -m jobs.launch --nproc-per-node=RANKS ranks_search.py FOLDER

FOLDER holds the dataset `data`. Searches are written beside it; one is taken further by each number of ranks.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_search import run_search
from tiny_training import on_each_rank

from features.errors import Preempted
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.trainer import Trainer

ENDS = {3: 4, 2: 9, 1: 99}  # of the search that is handed on: its last step by number of ranks
LEARNING = {"alpha_lr": 0.01, "beta_lr": 0.01, "evaluate_every": 2, "patience": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "first": {"search": LEARNING},
    "second": {
        "search": LEARNING | {"order": 2, "alpha_every": 2},
        "dense": {"name": "sgd", "lr": 0.5},
        "sharding": {"default": ["row_wise"]},
    },
    "one": {"search": LEARNING | {"paths": "one"}},
    "gates": {"search": LEARNING | {"budget": {"flops": 3000}}, "space": {"selection": "gates"}},
}
ON_THREE = ("second",)  # and the one that is handed on


class Ending(Observer):
    """SIGTERM in the midst of a step, to every rank; in none for a step beyond the end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def hand_on(folder: Path) -> None:
    """Takes the search as far as this number of ranks shall."""
    with suppress(Preempted):
        run_search(folder, "handed-on", Ending(ENDS[dist.get_world_size()]), **VARIANTS["first"])


def main(folder: Path) -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for name in ON_THREE if ranks == 3 else VARIANTS:
        made = run_search(folder, f"{name}-{ranks}", **VARIANTS[name])
        net = made.learner.supernet
        values = {key: net.get_parameter(key).detach().clone() for key in ("alpha_I", "alpha_NLO", "beta_TN")}
        torch.save(values, folder / f"{name}-{ranks}.{rank}.pt")
    hand_on(folder)


if __name__ == "__main__":
    on_each_rank(main)
