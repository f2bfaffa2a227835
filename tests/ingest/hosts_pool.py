"""A worker pool whose workers meet with an accident in a step, for test_hosts.py; and work for workers without a job.

ACCIDENT is STEP:KIND[:FILE]. Kinds: pool (the pool and its workers are killed), silence (FILE appears, and nothing more).
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.ingest import steps
from pipeline.ingest.messages import Failure
from pipeline.ingest.runners import pool


def sleep(step: str, number: int, seconds: Any) -> Failure:
    """A piece of work that takes so long, or ends its worker; reports which process did it."""
    if seconds == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return Failure(str(os.getpid()))


def meet_with(accident: str) -> None:
    step, kind, *file = accident.split(":")

    def fail(job: Any, work: Any) -> Any:
        if kind == "pool":
            os.kill(os.getppid(), signal.SIGKILL)
        else:
            Path(file[0]).touch()
        time.sleep(600)

    steps.STEPS[step] = fail


if __name__ == "__main__":
    pool.COMMAND = [sys.executable, __file__]
    if "ACCIDENT" in os.environ:
        meet_with(os.environ["ACCIDENT"])
    pool.main()
