"""A process of a night: its output goes to a log of the night, and it does not outlive it."""

import ctypes
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from features.errors import one_line
from pipeline.processes import end_with
from pipeline.storage.files import appending, storage_of
from pipeline.storage.store_path import on_store
from pipeline.training.faults.preemption import PREEMPTED, PreemptionSignal

POLL_S = 0.1
MAX_LOG_BYTES = 16 << 20  # of a log on a store, its end
PUT_S = 60.0  # between two puts of a log

logger = logging.getLogger(__name__)


def run_module(module: str, arguments: Sequence[str], ranks: int, log: Path) -> int:
    """Runs `python -m MODULE` to its end, on several ranks by jobs.launch, its output added to a log. Returns as `call`."""
    launcher = ["jobs.launch", f"--nproc-per-node={ranks}", "-m", module] if ranks > 1 else [module]
    command = [sys.executable, "-m", *launcher, *arguments]
    if not on_store(log):
        with appending(log) as output:
            return call(command, output.fileno())
    with tempfile.TemporaryFile(buffering=0) as output:  # an object is not appended to
        if log.exists():
            output.write(log.read_bytes()[-MAX_LOG_BYTES:])
        with _put_meanwhile(output.fileno(), log):
            return call(command, output.fileno())


@contextmanager
def _put_meanwhile(output: int, log: Path) -> Iterator[None]:
    """Puts the end of a file on a store every PUT_S seconds, and when the block ends; what fails is a warning."""
    ended, known = threading.Event(), 0

    def put() -> None:
        nonlocal known
        if (size := os.fstat(output).st_size) == known:
            return
        try:
            storage_of(log).write(log, os.pread(output, MAX_LOG_BYTES, max(0, size - MAX_LOG_BYTES)))
            known = size
        except OSError as error:
            logger.warning("%s cannot be written: %s", log, one_line(error))

    def keep_putting() -> None:
        while not ended.wait(PUT_S):
            put()

    thread = threading.Thread(target=keep_putting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        put()


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
