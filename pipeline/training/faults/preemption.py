"""Preemption: SIGTERM, taken as a wish to end after the next checkpoint."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Notice:
    """Whether this process was told to end. aloud: says so, once."""

    def __init__(self, aloud: bool) -> None:
        self.aloud, self.given = aloud, False

    def _take(self, *_: object) -> None:
        if self.aloud and not self.given:
            os.write(2, b"told to end: one more step, then a checkpoint\n")  # a print may be under way already
        self.given = True

    @contextmanager
    def taken(self) -> Iterator["Notice"]:
        """Takes SIGTERM as a notice while the block runs. Signals are the main thread's: elsewhere it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
