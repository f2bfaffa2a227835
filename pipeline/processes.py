"""Processes that do not outlive the one that started them, and those that did."""

import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def end_with(parent: int, libc: ctypes.CDLL, number: int = signal.SIGTERM) -> None:
    """Has this process get a signal when its parent ends, and ends it where that is gone already."""
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)


def adopt(libc: ctypes.CDLL) -> None:
    """Makes this process the parent of its children's children once those have ended."""
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def children() -> list[int]:
    """The processes that this one is the parent of and that have not ended."""
    tasks = Path("/proc/self/task").glob("*/children")
    pids = [int(word) for task in tasks for word in task.read_text().split()]
    return [pid for pid in pids if not has_ended(pid)]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to notice that it has ended; False where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return Path("/proc/self/stat").exists()
