"""A search to which something happens, for test_search_runs.py: faulty_search.py FOLDER STEP SIGNAL."""

import os
import signal
import sys
from pathlib import Path

from tiny_search import searching

from jobs.entry import configure_logging, user_errors
from pipeline.search.search import SearchTrainer
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import train
from pipeline.training.trainer import Trainer

SETTINGS = {
    "search": {"paths": "one", "alpha_lr": 0.05, "beta_lr": 0.05, "evaluate_every": 3, "patience": None},
    "checkpoint_every": 5, "checkpoint_async": False, "max_steps": 16,
}  # fmt: skip


class Fault(Observer):
    """Sends itself the signal between forward and backward of the step."""

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step + 1 == int(sys.argv[2]):
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))


if __name__ == "__main__":
    configure_logging("info")
    with user_errors():
        folder = Path(sys.argv[1])
        train(searching(folder / "data", folder / "faulty", **SETTINGS), observers=[Fault()], kind=SearchTrainer)
