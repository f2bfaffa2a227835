"""What two ranks do, for test_store_runs.py: a run on disk, and the same on a store, in which rank 1 is killed once.

    python -m jobs.launch --nproc-per-node=2 --max-restarts=1 two_ranks_on_store.py FOLDER

FOLDER holds the dataset `data`; the store's folder is in the environment, as ON_STORE.
"""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_training import configuration, on_each_rank

from pipeline.storage.store_path import place
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

SETTINGS = {"dropout": 0.3, "checkpoint_every": 20, "max_steps": 40, "sharding": {"default": ["row_wise"]}}


class Killed(Observer):
    """Kills rank 1 of the first attempt, some steps after a checkpoint."""

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        if (trainer.state.step, dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]) == (30, 1, "0"):
            trainer.writer.wait()  # else the checkpoint may not be one yet
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    store = place(os.environ["ON_STORE"])
    for data, run in ((folder / "data", folder / "two"), (store / "data", store / "two")):
        observers = [Killed()] if run == store / "two" else []
        prepare(configuration(data, run, **SETTINGS), None, torch.device("cpu"), observers).run_to_end()


if __name__ == "__main__":
    on_each_rank(main)
