"""Contact of a node's launcher with the store of all launchers: whether it answers, and whether another received SIGTERM."""

import threading
import time

import torch.distributed as dist

INTERVAL_S = 0.5
PEERS_READ_S = 4 * INTERVAL_S  # within which all launchers have read what one has written
_ENDED = "taskfuse/ended"


class Contact:
    """A thread with a connection of its own: a call to a store whose host is cut off may block for a quarter of an hour.

    Args:
        store: of all launchers; nothing else uses this connection. terminated: set once this launcher has received SIGTERM.
    Attributes:
        ended: whether some launcher has received SIGTERM.
    """

    def __init__(self, store: dist.Store, terminated: threading.Event) -> None:
        self.store, self.terminated = store, terminated
        self.ended, self._broken, self._answered = False, False, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="contact")
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread: one that is in C++ as Python ends would abort the process."""
        self._stopped.set()
        self._thread.join(PEERS_READ_S)

    def silence(self) -> float:
        """Seconds since the store has answered; 0 once its host has closed the connection, which calls report by themselves."""
        return 0 if self._broken else time.monotonic() - self._answered

    def wait_for_end(self) -> bool:
        """Whether another launcher received SIGTERM, given the time in which this one hears of it."""
        end = time.monotonic() + PEERS_READ_S
        while not (self.ended or self._broken) and time.monotonic() < end:
            time.sleep(0.05)
        return self.ended

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                if self.terminated.is_set():
                    self.store.set(_ENDED, "")
                self.ended = self.ended or self.store.check([_ENDED])
                self._answered = time.monotonic()
                self._stopped.wait(INTERVAL_S)
        except dist.DistError:
            self._broken = True
