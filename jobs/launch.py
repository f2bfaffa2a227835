"""jobs.launch: torchrun, with an exit code that tells preemption from failure.

torchrun exits with 1 whatever its ranks do once it is told to end. This one exits with 75 if all ranks of this machine
have kept their work in a checkpoint; arguments are torchrun's.

Examples:
  python -m jobs.launch --standalone --nproc-per-node=2 -m jobs.train dataset=runs/demo/data model=ple run=runs/demo/ple
  python -m jobs.launch --standalone --nproc-per-node=8 --max-restarts=3 -m jobs.train dataset=D model=adatt run=R
  python -m jobs.launch --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=H:29400 -m jobs.train dataset=D run=R
"""

import os
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException

from jobs.entry import NOTES, PREEMPTED


def main() -> None:
    """Runs torchrun in this process, and asks its ranks' notes how they ended where it was told to end."""
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(f"{__doc__.strip()}\n")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[NOTES] = folder
        try:
            run.main()
        except SignalException as signal:
            ranks = [note.read_text() for note in Path(folder).iterdir()]
            if ranks and len(ranks) == int(ranks[0]):
                sys.exit(PREEMPTED)
            sys.exit(
                f"error: ended by {signal.sigval.name} before all ranks had written a checkpoint; the newest one stands"
            )


if __name__ == "__main__":
    main()
