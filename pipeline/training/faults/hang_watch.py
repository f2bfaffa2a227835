"""A run that hangs: ranks that wait in vain name the one they wait for, and end."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

PHASES = ("start", "data", "step", "save")  # in the order in which a step goes through them
LONG = ("start", "save")  # may take as long as they like, for a rank that answers


class Beat(NamedTuple):
    """What a rank says of itself; `alive` rises as long as it lives."""

    alive: int
    step: int
    phase: str
    seconds: float
    host: str
    pid: int
    launcher: int  # pid


class Watch:
    """Tells the other ranks once a second where this one is, and looks where they are once it has waited for `timeout`.

    Args:
        store: that all ranks reach. rank, ranks: of the process group. timeout: seconds.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, timeout: float) -> None:
        self.store, self.rank, self.ranks, self.timeout = store, rank, ranks, timeout
        self.every = min(1.0, timeout / 5)
        self.step, self.phase, self.since, self.count = 0, "start", time.monotonic(), 0
        self.ended = threading.Event()
        self._tell()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()

    def at(self, step: int, phase: str) -> None:
        """Notes what this rank does from now on, one of PHASES."""
        self.step, self.phase, self.since = step, phase, time.monotonic()

    def end(self) -> None:
        """Stops looking."""
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.ended.wait(self.every):
            try:
                self._tell()
                if time.monotonic() - self.since < 0.8 * self.timeout:
                    continue
                stuck, first = (self.step, self.phase), self._beats()
                for _ in range(3):
                    self.ended.wait(max(self.every, self.timeout / 15))
                    self._tell()
                then = self._beats()
            except dist.DistError:
                return  # the store is gone, and its owner, torchrun, ends us
            busy = any(beat.phase in LONG for beat in then if beat)
            if self.ended.is_set() or (self.step, self.phase) != stuck or (busy and not silent(first, then)):
                continue
            print(f"error (rank {self.rank}): {blame(first, then, self.rank)}", file=sys.stderr, flush=True)
            self._end(then[rank] for rank in silent(first, then))
            os._exit(1)  # the main thread waits in a collective, which nothing interrupts

    def _end(self, beats: Iterable[Beat | None]) -> None:
        """Kills those of this launcher: it would wait 30 s for a stopped one to end by itself."""
        for beat in beats:
            if beat is not None and (beat.host, beat.launcher) == (socket.gethostname(), os.getppid()):
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _tell(self) -> None:
        self.count += 1
        waited, host = time.monotonic() - self.since, socket.gethostname()
        beat = Beat(self.count, self.step, self.phase, waited, host, os.getpid(), os.getppid())
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _beats(self) -> list[Beat | None]:
        """The ranks' last words, None of one that has not begun."""
        keys = [f"beat/{rank}" for rank in range(self.ranks)]
        return [Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None for key in keys]


def silent(first: list[Beat | None], then: list[Beat | None]) -> list[int]:
    """The ranks that said nothing between two looks, some seconds apart."""
    return [rank for rank, (a, b) in enumerate(zip(first, then, strict=True)) if b is None or a == b]


def blame(first: list[Beat | None], then: list[Beat | None], teller: int) -> str:
    """One line about the rank that the others wait for: one that is silent, or else the one furthest behind.

    Args:
        first, then: of each rank, some seconds apart. teller: the rank that speaks.
    """
    waits = then[teller]
    assert waits is not None
    begin = f"step {waits.step}: the ranks have waited for each other for {waits.seconds:.0f} s: "
    end = " It is ended; torchrun --max-restarts=N goes on from the newest checkpoint."
    if quiet := silent(first, then):
        rank, beat = quiet[0], then[quiet[0]]
        more = f" (and {len(quiet) - 1} more)" if len(quiet) > 1 else ""
        known = f", pid {beat.pid} on {beat.host}, was at step {beat.step} and" if beat else ""
        return f"{begin}rank {rank}{known} does not answer: it is stopped, or its machine is gone{more}.{end}"
    beats = [beat for beat in then if beat is not None]
    rank = min(range(len(beats)), key=lambda r: (beats[r].step, PHASES.index(beats[r].phase)))
    last, where = beats[rank], (beats[rank].step, beats[rank].phase)
    if all((beat.step, beat.phase) == where for beat in beats):
        return f"{begin}all of them are in the same step, so the network between them is the first suspect.{end}"
    doing = {"data": "waits for its data", "step": "is in it", "save": "writes a checkpoint", "start": "starts"}
    return (
        f"{begin}rank {rank}, pid {last.pid} on {last.host}, {doing[last.phase]} since {last.seconds:.0f} s, in step "
        f"{last.step}.{end}"
    )
