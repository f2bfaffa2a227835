"""A process of a night: its output goes to a log of the night, and it does not outlive it."""

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.processes import end_with
from pipeline.storage.files import appending, storage_of
from pipeline.storage.store_path import on_store
from pipeline.training.faults.preemption import PREEMPTED, PreemptionSignal

POLL_S = 0.1
MAX_LOG_BYTES = 64 << 20  # of a log on a store, its end


def run_module(module: str, arguments: Sequence[str], ranks: int, log: Path) -> int:
    """Runs `python -m MODULE` to its end, on several ranks by jobs.launch, its output added to a log. Returns as `call`."""
    launcher = ["jobs.launch", f"--nproc-per-node={ranks}", "-m", module] if ranks > 1 else [module]
    command = [sys.executable, "-m", *launcher, *arguments]
    if not on_store(log):
        with appending(log) as output:
            return call(command, output.fileno())
    with tempfile.TemporaryFile() as output:  # an object is not appended to
        try:
            return call(command, output.fileno())
        finally:
            output.seek(0)
            earlier = log.read_bytes() if log.exists() else b""
            storage_of(log).write(log, (earlier + output.read())[-MAX_LOG_BYTES:])


def call(command: Sequence[str], output: int) -> int:
    """Runs a process to its end. Returns its exit code, PREEMPTED where this one received SIGTERM: it is passed on.

    The process gets SIGTERM when this one ends, too, whichever way: it would work on unwatched.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None)
    with PreemptionSignal(log=False).handling() as preemption:
        process = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=lambda: end_with(parent, libc))
        try:
            while process.poll() is None and not preemption.received:
                time.sleep(POLL_S)
        finally:
            process.terminate()  # once, and not where it has ended
            code = process.wait()
    return PREEMPTED if preemption.received else code
