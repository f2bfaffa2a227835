"""Preemption: SIGTERM ends training after a checkpoint, and start-up at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.training.faults.rank_status import write_rank_status

PREEMPTED = os.EX_TEMPFAIL  # 75, which tells a scheduler to run the same command again


class PreemptionSignal:
    """Whether this process received SIGTERM. log: write a line about it, once."""

    def __init__(self, log: bool) -> None:
        self.log, self.received = log, False

    def _receive(self, *_: object) -> None:
        if self.log and not self.received:
            os.write(2, b"SIGTERM: one more step, then a checkpoint\n")  # a handler must not log: the lock may be taken
        self.received = True

    def hold(self) -> None:
        """Waits, with everything saved, until the launcher ends this process to start all ranks again. Raises SystemExit."""
        self.log = False
        write_rank_status("holding")
        while not self.received:
            time.sleep(0.05)
        raise SystemExit(PREEMPTED)

    @contextmanager
    def handling(self) -> Iterator["PreemptionSignal"]:
        """Handles SIGTERM while the block runs. Signals are the main thread's: elsewhere it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def exiting_at_start(log: bool) -> Iterator[None]:
    """Within it SIGTERM ends the process with PREEMPTED at once, even while it waits for other ranks in a library.

    Python runs signal handlers between its own instructions, so not in a wait within C: torchrun would kill such a rank after
    30 s. The wake-up descriptor is written to by the C handler, whatever the main thread does.

    Args:
        log: write a line about it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    earlier_descriptor = signal.set_wakeup_fd(write_end)

    def wait() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                if log:
                    os.write(
                        2, b"SIGTERM outside of training: nothing is lost. Rerun the same command to start or resume.\n"
                    )
                write_rank_status("preempted")
                os._exit(PREEMPTED)

    thread = threading.Thread(target=wait, daemon=True, name="preemption")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_descriptor)
        signal.signal(signal.SIGTERM, before)
        os.close(write_end)
        thread.join()
        os.close(read_end)
