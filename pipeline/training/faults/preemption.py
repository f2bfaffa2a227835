"""Preemption: SIGTERM ends training after a checkpoint, and start-up at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.training.faults.rank_status import write_rank_status

PREEMPTED = os.EX_TEMPFAIL  # 75, which tells a scheduler to run the same command again


class PreemptionSignal:
    """Whether this process received SIGTERM. log: write a line about it, once."""

    def __init__(self, log: bool) -> None:
        self.received = False
        # A list: the handler and the thread may take the line at the same time, and `pop` is atomic.
        self._lines = [b"SIGTERM: one more step, then a checkpoint\n"] if log else []

    def _receive(self) -> None:
        self.received = True
        with suppress(IndexError):
            os.write(2, self._lines.pop())  # a handler must not log: the lock may be taken

    def hold(self) -> None:
        """Waits, with everything saved, until the launcher ends this process to start all ranks again. Raises SystemExit."""
        self._lines.clear()
        write_rank_status("holding")
        while not self.received:
            time.sleep(0.05)
        raise SystemExit(PREEMPTED)

    @contextmanager
    def handling(self, also: Callable[[], None] = lambda: None) -> Iterator["PreemptionSignal"]:
        """Handles SIGTERM while the block runs, also while the main thread waits in C. Elsewhere than there it does nothing.

        Args:
            also: called in a thread, once the signal has come.
        """

        def at_once() -> None:
            self._receive()
            also()

        with _on_sigterm(lambda *_: self._receive(), at_once):
            yield self


@contextmanager
def exiting_at_start(log: bool) -> Iterator[None]:
    """Within it SIGTERM ends the process with PREEMPTED at once, even while it waits for other ranks in a library.

    torchrun would kill such a rank after 30 s.

    Args:
        log: write a line about it.
    """

    def end() -> None:
        if log:
            os.write(2, b"SIGTERM outside of training: nothing is lost. Rerun the same command to start or resume.\n")
        write_rank_status("preempted")
        os._exit(PREEMPTED)

    with _on_sigterm(lambda *_: None, end):
        yield


@contextmanager
def _on_sigterm(handler: Callable[..., None], at_once: Callable[[], None]) -> Iterator[None]:
    """Within it SIGTERM calls `handler` in the main thread, and `at_once` in another.

    Python runs signal handlers between its own instructions, so not in a wait within C. The wake-up descriptor is written to by
    the C handler, whatever the main thread does. Signals are the main thread's: elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.signal(signal.SIGTERM, handler)
    earlier_descriptor = signal.set_wakeup_fd(write_end)

    def wait() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                at_once()

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
