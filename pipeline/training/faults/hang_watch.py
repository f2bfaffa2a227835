"""Hung ranks: each rank beats, ranks that wait in vain name the one they wait for and exit, a launcher ends a silent one."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from pipeline.torch_compat import default_store
from pipeline.training.faults.rank_status import end_heartbeat, write_heartbeat, write_rank_status

PHASES = ("start", "data", "step", "save")  # in the order in which a step goes through them
UNLIMITED = ("start", "save")  # phases that may take any time, for a rank that beats


class Heartbeat(NamedTuple):
    """The last heartbeat of a rank. beats: rises as long as it lives. launcher: pid of its torchrun."""

    beats: int
    step: int
    phase: str
    seconds: float
    host: str
    pid: int
    launcher: int


class HangWatch:
    """A thread that beats once a second, and compares the ranks' heartbeats once this rank has waited for `timeout`.

    A single rank has nobody to compare with: its heartbeat is for jobs.launch.

    Args:
        store: that all ranks reach; None for a single rank. rank, ranks: of the process group. timeout: seconds.
    """

    def __init__(self, store: dist.Store | None, rank: int, ranks: int, timeout: float) -> None:
        self.store, self.rank, self.ranks, self.timeout = store, rank, ranks, timeout
        self.interval = min(1.0, timeout / 5)
        self.step, self.phase, self.since, self.beats = 0, "start", time.monotonic(), 0
        self.taken = 0  # steps
        self.answered = time.monotonic()  # when the store did last
        self.stopped = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, daemon=True, name="hang watch")
        self.thread.start()
        if store is not None:
            threading.Thread(target=self._watch_store, daemon=True, name="store watch").start()

    def enter(self, step: int, phase: str) -> None:
        """Records what this rank does from now on, one of PHASES."""
        self.taken += 0 < self.step < step
        self.step, self.phase, self.since = step, phase, time.monotonic()

    def stop(self) -> None:
        """Ends the thread."""
        self.stopped.set()
        self.thread.join(self.timeout)  # no longer: its store may not answer
        end_heartbeat()

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                self._beat()
                if self.store is None or time.monotonic() - self.since < 0.8 * self.timeout:
                    continue
                stuck, before = (self.step, self.phase), self._heartbeats()
                for _ in range(3):
                    self.stopped.wait(max(self.interval, self.timeout / 15))
                    self._beat()
                now = self._heartbeats()
            except dist.DistError:
                self.stopped.set()  # the store is gone, and its owner, torchrun, ends this process
                return
            busy = any(beat.phase in UNLIMITED for beat in now if beat)
            if self.stopped.is_set() or (self.step, self.phase) != stuck or (busy and not silent(before, now)):
                continue
            self._kill(now[rank] for rank in silent(before, now))
            self._end(diagnosis(before, now, self.rank))

    def _watch_store(self) -> None:
        """Ends this rank where the store's host is cut off: a call to it may then block for a quarter of an hour."""
        while not self.stopped.wait(self.interval):
            if (silence := time.monotonic() - self.answered) > 1.5 * self.timeout:
                self._end(
                    f"step {self.step}: the node of rank 0 does not answer for {silence:.0f} s: it is gone, or the network. "
                    "jobs.launch --max-restarts=N resumes from the newest checkpoint."
                )

    def _end(self, why: str) -> None:
        # Not logged: the thread that hangs may hold the lock of a log handler.
        print(f"error (rank {self.rank}): {why}", file=sys.stderr, flush=True)
        write_rank_status("lost", why)
        end_heartbeat()
        os._exit(1)  # the main thread waits in a collective, which nothing interrupts

    def _kill(self, heartbeats: Iterable[Heartbeat | None]) -> None:
        """Kills those of this launcher, which would wait 30 s for a stopped one to exit by itself."""
        for beat in heartbeats:
            if beat is not None and (beat.host, beat.launcher) == (socket.gethostname(), os.getppid()):
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _beat(self) -> None:
        # Other ranks report first, by name.
        write_heartbeat(self.step, self.timeout if self.store is None else 2 * self.timeout, self.taken)
        if self.store is None:
            return
        self.beats += 1
        waited, host = time.monotonic() - self.since, socket.gethostname()
        beat = Heartbeat(self.beats, self.step, self.phase, waited, host, os.getpid(), os.getppid())
        self.store.set(f"beat/{self.rank}", json.dumps(beat))
        self.store.check([f"beat/{self.rank}"])  # which is answered
        self.answered = time.monotonic()

    def _heartbeats(self) -> list[Heartbeat | None]:
        """The ranks' last heartbeats, None of one that has not begun."""
        assert self.store is not None
        keys = [f"beat/{rank}" for rank in range(self.ranks)]
        return [Heartbeat(*json.loads(self.store.get(key))) if self.store.check([key]) else None for key in keys]


def watch_ranks(timeout: float) -> HangWatch:
    """A watch over the ranks of the process group. timeout: seconds."""
    ranks, store = dist.get_world_size(), None
    if ranks > 1:
        store = default_store()
        store.set_timeout(timedelta(seconds=timeout))
    return HangWatch(store, dist.get_rank(), ranks, timeout)


def silent(before: list[Heartbeat | None], now: list[Heartbeat | None]) -> list[int]:
    """The ranks without a heartbeat between two readings, some seconds apart."""
    return [rank for rank, (a, b) in enumerate(zip(before, now, strict=True)) if b is None or a == b]


def diagnosis(before: list[Heartbeat | None], now: list[Heartbeat | None], reporter: int) -> str:
    """One line about the rank that the others wait for: a silent one, or else the one furthest behind.

    Args:
        before, now: of each rank, some seconds apart. reporter: the rank that reports.
    """
    waits = now[reporter]
    assert waits is not None
    begin = f"step {waits.step}: the ranks have waited for each other for {waits.seconds:.0f} s: "
    end = " It is ended; jobs.launch --max-restarts=N resumes from the newest checkpoint."
    if quiet := silent(before, now):
        rank, beat = quiet[0], now[quiet[0]]
        more = f" (and {len(quiet) - 1} more)" if len(quiet) > 1 else ""
        known = f", pid {beat.pid} on {beat.host}, was at step {beat.step} and" if beat else ""
        return f"{begin}rank {rank}{known} does not answer: it is stopped, or its machine is gone{more}.{end}"
    beats = [beat for beat in now if beat is not None]
    rank = min(range(len(beats)), key=lambda r: (beats[r].step, PHASES.index(beats[r].phase)))
    last, where = beats[rank], (beats[rank].step, beats[rank].phase)
    if all((beat.step, beat.phase) == where for beat in beats):
        return f"{begin}all of them are in the same step, so suspect the network between them first.{end}"
    doing = {"data": "waits for data", "step": "is in it", "save": "writes a checkpoint", "start": "starts"}
    return (
        f"{begin}rank {rank}, pid {last.pid} on {last.host}, {doing[last.phase]} since {last.seconds:.0f} s, in step "
        f"{last.step}.{end}"
    )
