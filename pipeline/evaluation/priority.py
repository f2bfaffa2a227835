"""The priority of an evaluator that follows a run on the trainer's machine."""

import os
from contextlib import suppress
from pathlib import Path

THREADS = Path("/proc/self/task")
NICE = 10


def lower(idle: bool) -> None:
    """Lowers the priority of this process, for good; threads that it starts later inherit it.

    Args:
        idle: run on cores that nobody else wants (SCHED_IDLE of Linux, see sched(7)): a waiting thread of the trainer takes the
            core at once, and reads and writes get the idle class of the I/O scheduler, which follows the policy. On a machine
            without an idle core the evaluator then nearly stands still. Else, and on other systems, it has nice 10 and its
            share of the cores.
    """
    os.nice(NICE)
    if not idle or not hasattr(os, "SCHED_IDLE"):
        return
    for thread in sorted(THREADS.iterdir()):
        with suppress(OSError):  # it ended, or the container forbids it
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
