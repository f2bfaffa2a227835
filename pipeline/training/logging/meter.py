"""Throughput: rows a second, and the share of time spent waiting for data."""

import time
from collections.abc import Iterator

from features.batch import Batch


class ThroughputMeter:
    """Measures from one reading to the next; paused time does not count.

    Args:
        rows, step: consumed so far.
    """

    def __init__(self, rows: int, step: int) -> None:
        self.rows, self.step = rows, step
        self.seconds = self.waited = 0.0
        self.resume()

    def resume(self) -> None:
        """Ends a pause."""
        self.begin = time.perf_counter()

    def pause(self) -> None:
        """Begins a pause."""
        self.seconds += time.perf_counter() - self.begin

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; measures how long each is waited for."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def read(self, rows: int, step: int) -> tuple[float, float, float]:
        """Rows a second, share of time waited, seconds a step; since the last reading."""
        self.pause()
        seconds = max(self.seconds, 1e-9)
        reading = (rows - self.rows) / seconds, self.waited / seconds, seconds / max(step - self.step, 1)
        self.rows, self.step, self.seconds, self.waited = rows, step, 0.0, 0.0
        self.resume()
        return reading
