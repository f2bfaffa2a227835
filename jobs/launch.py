"""jobs.launch: torchrun, with an exit code that tells preemption from failure.

torchrun exits with 1 whatever its ranks do once one is told to end. This one exits with 75 if all ranks of this machine
have kept their work in a checkpoint or had none yet, with 0 if they were done nevertheless; arguments are torchrun's.
Between SIGTERM and SIGKILL they have 600 s, or what TORCH_ELASTIC_SHUTDOWN_TIMEOUT says.

Examples:
  python -m jobs.launch --standalone --nproc-per-node=2 -m jobs.train dataset=runs/demo/data model=ple run=runs/demo/ple
  python -m jobs.launch --standalone --nproc-per-node=8 --max-restarts=3 -m jobs.train dataset=D model=adatt run=R
  python -m jobs.launch --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=H:29400 -m jobs.train dataset=D run=R
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.entry import NOTES, PREEMPTED, Note

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main() -> None:
    """Runs torchrun in this process, and asks its ranks' notes how they ended where not all of them exited with 0."""
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(f"{__doc__.strip()}\n")
    # Until torchrun has ranks, which it may wait minutes for, and takes the signal itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[NOTES] = folder
        try:
            run.main()
        except SignalException as error:
            sys.exit(after_signal(error.sigval.name, read_notes(Path(folder))))
        except ChildFailedError as error:
            sys.exit(after_failure(error.failures, read_notes(Path(folder))))


def read_notes(folder: Path) -> list[Note]:
    """The last note of each rank that has begun the last attempt that any has begun."""
    notes = [Note(*json.loads(path.read_text())) for path in folder.iterdir() if not path.suffix]
    last = max((note.attempt for note in notes), default=0)
    return [note for note in notes if note.attempt == last]


def after_signal(name: str, notes: list[Note]) -> int | str:
    """What to exit with once torchrun was told to end. A rank without a note had nothing to lose.

    Args:
        name: of the signal. notes: of the last attempt.
    """
    states = [note.state for note in notes]
    if "started" in states:
        return f"error: ended by {name} before all ranks had written a checkpoint; the newest one stands"
    if notes and states == ["finished"] * notes[0].ranks:
        return 0
    return PREEMPTED


def after_failure(failures: "dict[int, ProcessFailure]", notes: Iterable[Note]) -> int | str:
    """What to exit with once ranks have ended with another code than 0; those that failed have said why.

    Args:
        failures: by rank. notes: of the last attempt.
    """
    states = {note.pid: note.state for note in notes}

    def lost_nothing(failure: "ProcessFailure") -> bool:
        if failure.pid not in states and failure.exitcode == -signal.SIGTERM:
            return True  # it was importing still
        return failure.exitcode == PREEMPTED or states.get(failure.pid) == "preempted"

    if all(map(lost_nothing, failures.values())):
        return PREEMPTED
    killed = {rank: f for rank, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if not killed:
        return 1
    ranks = ", ".join(f"rank {rank} by {failure.signal_name()}" for rank, failure in killed.items())
    return f"error: killed: {ranks}. The kernel sends SIGKILL where memory runs out. The newest checkpoint stands."


if __name__ == "__main__":
    main()
