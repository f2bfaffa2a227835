"""A sink in a thread of its own: no job waits for a server, or for a database that another process has locked."""

import logging
from queue import Full, Queue
from threading import Thread
from typing import NamedTuple

from features.errors import UserError, one_line
from pipeline.run.tracking.base import Event, Sink, State

QUEUE = 1000  # events that may wait
CLOSE_S = 20.0  # seconds that a job that has ended waits for the rest

logger = logging.getLogger(__name__)


class _Closed(NamedTuple):
    state: State


class Background:
    """Passes events on in a thread; those that find the queue full are counted and left out.

    Args:
        name: of the sink, for messages. sink: whose errors are logged, each kind once.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.sink, self.left_out = name, sink, 0
        self.logged: set[str] = set()
        self.events: Queue[Event | _Closed] = Queue(QUEUE)
        self.thread = Thread(target=self._work, daemon=True, name=name)
        self.thread.start()

    def handle(self, event: Event) -> None:
        """Queues an event, without waiting."""
        try:
            self.events.put_nowait(event)
        except Full:
            self.left_out += 1

    def close(self, state: State) -> None:
        """Waits for the events that are queued, no longer than CLOSE_S. Raises UserError where some were left out."""
        try:
            self.events.put(_Closed(state), timeout=CLOSE_S)
            self.thread.join(CLOSE_S)
        except Full:
            pass
        if (missing := self.left_out + self.events.qsize() + self.thread.is_alive()) > 0:
            raise UserError(f"{missing} events could not be sent in time; rerun the same command to send them")

    def _work(self) -> None:
        while True:
            event = self.events.get()
            try:
                if isinstance(event, _Closed):
                    self.sink.close(event.state)
                    return
                self.sink.handle(event)
            except Exception as error:  # of a library: the job goes on
                log_once(self.logged, self.name, error)
                if isinstance(event, _Closed):
                    return


def log_once(logged: set[str], name: str, error: Exception) -> None:
    """One line for the first error of a kind."""
    if (kind := type(error).__name__) not in logged:
        logged.add(kind)
        logger.warning(
            f"tracking by {name}: {one_line(error)}. The job goes on; metrics/*.jsonl of the run have all figures."
        )
