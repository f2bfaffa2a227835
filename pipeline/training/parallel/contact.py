"""Contact of a node's launcher with the store of all launchers: whether it answers, and whether another received SIGTERM."""

import socket
import threading
import time

import torch.distributed as dist

INTERVAL_S = 0.5
PEERS_READ_S = 4 * INTERVAL_S  # within which all launchers have read what one has written
ROUNDS = "taskfuse/rounds"  # how many rounds of a changing number of nodes have begun
_ENDED, _LAUNCHERS, _CLOCK = "taskfuse/ended", "taskfuse/launchers", "taskfuse/clock"


class Contact:
    """A thread with a connection of its own: a call to a store whose host is cut off may block for a quarter of an hour.

    Args:
        store: of all launchers; nothing else uses this connection. terminated: set once this launcher has received SIGTERM.
    Attributes:
        round: the newest one with this node, from 0 on; -1 before it has joined one, and where rounds are not counted.
        ended_by: the host of a launcher that has received SIGTERM in the newest round; empty if none has. Where the others go
            on without it, their next round is not ended by it.
        ahead: seconds that this machine's clock is ahead of the one of the first launcher, to about INTERVAL_S.
    """

    def __init__(self, store: dist.Store, terminated: threading.Event) -> None:
        self.store, self.terminated = store, terminated
        self.round, self.ended_by, self.ahead, self._clock = -1, "", 0.0, ""
        self._broken, self._answered = False, time.monotonic()
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
        while not (self.ended_by or self._broken) and time.monotonic() < end:
            time.sleep(0.05)
        return bool(self.ended_by)

    def _compare_clocks(self, first: bool) -> None:
        if first:
            self.store.set(_CLOCK, str(time.time()))
        elif self.store.check([_CLOCK]) and (clock := self.store.get(_CLOCK).decode()) != self._clock:
            if self._clock:  # else it may be old: the first launcher may have gone
                self.ahead = time.time() - float(clock)
            self._clock = clock

    def _run(self) -> None:
        try:
            first = self.store.add(_LAUNCHERS, 1) == 1
            while not self._stopped.is_set():
                if self.terminated.is_set():
                    self.store.set(f"{_ENDED}/{self.round}", socket.gethostname())
                # Asked each time, also when the answer is known: without an answer `silence` would not grow.
                ended = f"{_ENDED}/{self.store.add(ROUNDS, 0) - 1}"
                self.ended_by = self.store.get(ended).decode() if self.store.check([ended]) else ""
                self._compare_clocks(first)
                self._answered = time.monotonic()
                self._stopped.wait(INTERVAL_S)
        except dist.DistError:
            self._broken = True
