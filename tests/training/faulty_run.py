"""A run to which something happens, for test_survival.py: faulty_run.py FOLDER NAME ATTEMPT SETTINGS FAULTS, under torchrun.

SETTINGS: of train, in JSON. FAULTS: in JSON, a list of [attempt, rank, step, signal, "self" or "launcher"]. Attempts of one
torchrun follow each other from ATTEMPT on. Each rank notes in FOLDER/NAME.seen/ which rows it took in which step. A run
that goes on first writes the state that it has loaded to FOLDER/NAME.again/.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from tiny_training import configuration

import pipeline.training.trainer as module
from features.batch import PADDING
from jobs.entry import user_errors
from pipeline.run import checkpoint
from pipeline.training.step import StepOutput

FOLDER, NAME = Path(sys.argv[1]), sys.argv[2]
ATTEMPT = int(sys.argv[3]) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
FAULTS = {(attempt, rank, step): rest for attempt, rank, step, *rest in json.loads(sys.argv[5])}


class Faulty(module.Trainer):
    """Notes its rows, and in the midst of a step, between forward and backward, does to itself what FAULTS say."""

    def run_to_end(self) -> object:
        if self.step and not (FOLDER / f"{NAME}.again").exists():
            dist.barrier()
            checkpoint.save(FOLDER / f"{NAME}.again", self.learner.state(), self._manifest(0))
        return super().run_to_end()

    def _look(self, output: StepOutput) -> None:
        super()._look(output)
        if fault := FAULTS.get((ATTEMPT, self.rank, self.step + 1)):
            name, whom = fault
            os.kill(os.getpid() if whom == "self" else os.getppid(), getattr(signal, name))

    def _outputs(self, batches: Iterator) -> Iterator[StepOutput]:
        seen = FOLDER / f"{NAME}.seen"
        seen.mkdir(exist_ok=True)
        with (seen / f"{ATTEMPT}-{self.rank}.jsonl").open("a") as file:
            for output in super()._outputs(batches):
                rows = output.row_id_B[output.row_id_B != PADDING].tolist()
                line = {"attempt": ATTEMPT, "step": self.step + 1, "time": time.time(), "rows": rows}
                file.write(json.dumps(line) + "\n")
                file.flush()
                yield output


if __name__ == "__main__":
    module.Trainer = Faulty
    with user_errors():
        module.train(configuration(FOLDER / "data", FOLDER / NAME, **json.loads(sys.argv[4])))
