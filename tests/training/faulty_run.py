"""A run to which something happens, for test_survival.py: faulty_run.py FOLDER NAME ATTEMPT SETTINGS FAULTS, under torchrun.

SETTINGS: of train, in JSON. FAULTS: in JSON, a list of [attempt, rank, step, fault, whom]: a signal to "self" or "launcher", or
"waits in C". Attempts of one torchrun follow each other from ATTEMPT on. Each rank writes in FOLDER/NAME.seen/ which rows it
took in which step. A run that resumes first writes the state that it has loaded to FOLDER/NAME.again/. PAUSE in the
environment: seconds that a step takes at least.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tiny_training import configuration

from features.batch import PADDING
from jobs.entry import configure_logging, user_errors
from pipeline.run import checkpoint
from pipeline.training.faults.rank_status import ROUND
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import train
from pipeline.training.trainer import Trainer

FOLDER, NAME = Path(sys.argv[1]), sys.argv[2]
ATTEMPT = int(sys.argv[3]) + int(os.environ.get(ROUND, 0))
PAUSE = float(os.environ.get("PAUSE", 0))
FAULTS = {(attempt, rank, step): rest for attempt, rank, step, *rest in json.loads(sys.argv[5])}


def wait_in_c() -> None:
    """For ever, without the GIL: as in a wait for a GPU, no signal's handler in Python runs, and none interrupts it."""
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


class Faults(Observer):
    """Writes its rows down, and in the midst of a step, between forward and backward, does to itself what FAULTS say."""

    def on_start(self, trainer: Trainer) -> None:
        if trainer.state.step and not (FOLDER / f"{NAME}.again").exists():
            dist.barrier()
            checkpoint.save(FOLDER / f"{NAME}.again", trainer.learner.state(), trainer.manifest(0))

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        time.sleep(PAUSE)
        if fault := FAULTS.get((ATTEMPT, trainer.rank, trainer.state.step + 1)):
            name, whom = fault
            if name == "waits in C":
                wait_in_c()
            os.kill(os.getpid() if whom == "self" else os.getppid(), getattr(signal, name))
            while whom == "launcher" and not trainer.preemption.received:  # it passes the signal on when it next looks
                time.sleep(0.01)

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        seen = FOLDER / f"{NAME}.seen"
        seen.mkdir(exist_ok=True)
        rows = output.row_id_B[output.row_id_B != PADDING].tolist()
        line = {
            "attempt": ATTEMPT, "step": trainer.state.step, "time": time.time(), "rows": rows, "ranks": trainer.ranks,
            "pid": os.getpid(),
        }  # fmt: skip
        with (seen / f"{ATTEMPT}-{trainer.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    configure_logging("info")
    with user_errors():
        train(configuration(FOLDER / "data", FOLDER / NAME, **json.loads(sys.argv[4])), observers=[Faults()])
