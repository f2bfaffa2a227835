"""Hung and failed ranks: each rank beats; ranks that wait in vain name the one they wait for and exit, wherever they wait."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Literal, NamedTuple

import torch.distributed as dist

from pipeline.processes import has_ended
from pipeline.torch_compat import default_store
from pipeline.training.faults.failures import FAILED, Failure, failure_of, leave, report, report_gone, reported
from pipeline.training.faults.rank_status import end_heartbeat, write_heartbeat, write_rank_status

PHASES = ("start", "data", "step", "save")  # in the order in which a step goes through them
UNLIMITED = ("start", "save")  # phases that may take any time, for a rank that beats

RESUMES = "jobs.launch --max-restarts=N resumes from the newest checkpoint."
# A rank whose peer has failed has so long to end by itself, with its own error: gloo reports a broken connection at once.
GRACE_S = 5.0
SAVING_S = 30.0  # the same where it writes a checkpoint, which may be complete without that peer
LAST_WORDS_S = 10.0  # that a rank waits for a store to take what it writes as it ends
# Where the store's host has closed the connection a step may take so long, or `timeout` if that is less.
STORE_GONE_S = 60.0


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

    Another one watches this rank: a store that is cut off may hold the first one up.

    It ends this process, with one line, where the main thread cannot: one that waits in C, as for a collective of NCCL whose
    peer is dead, runs no Python, not even a handler of signals. Such waits release the GIL, so this thread runs. Where one did
    not, this rank would fall silent: the others name it, and its launcher kills it.

    A single rank has nobody to compare with: its heartbeat is for jobs.launch.

    Args:
        store: that all ranks reach; None for a single rank. rank, ranks: of the process group. timeout: seconds.
        local: the other ranks of this machine.
    """

    def __init__(
        self, store: dist.Store | None, rank: int, ranks: int, timeout: float, local: Sequence[int] = ()
    ) -> None:
        self.store, self.rank, self.ranks, self.timeout = store, rank, ranks, timeout
        self.interval = min(1.0, timeout / 5)
        self.step, self.phase, self.since, self.beats = 0, "start", time.monotonic(), 0
        self.taken = 0  # steps
        self.answered = time.monotonic()  # when the store did last
        # When another rank's failure was read, SIGTERM came, the store was found gone.
        self.failed_at = self.asked_at = self.store_gone_at = float("inf")
        self.unknown, self.pids = set(local), dict[int, int]()  # of this machine, by rank
        self.failure: Failure | None = None  # this rank's
        self.stopped = threading.Event()
        self._beat()
        self.thread = threading.Thread(target=self._run, daemon=True, name="hang watch")
        self.thread.start()
        if store is not None:
            threading.Thread(target=self._watch_self, daemon=True, name="self watch").start()

    def enter(self, step: int, phase: str) -> None:
        """Records what this rank does from now on, one of PHASES."""
        self.taken += 0 < self.step < step
        self.step, self.phase, self.since = step, phase, time.monotonic()

    def expect_end(self) -> None:
        """Called once SIGTERM has come."""
        self.asked_at = min(self.asked_at, time.monotonic())

    def stop(self, error: BaseException | None = None) -> None:
        """Ends the thread, which first writes for the other ranks that this one leaves.

        Args:
            error: why; all other ranks will print it, and end, unless it is one of preemption.
        """
        self.failure = failure_of(self.rank, error)
        self.stopped.set()
        self.thread.join(min(self.timeout, LAST_WORDS_S))  # no longer: its store may not answer
        end_heartbeat()

    def _run(self) -> None:
        try:
            while not self.stopped.wait(self.interval):
                self._attend()
                if self.store is not None and time.monotonic() - self.since >= 0.8 * self.timeout:
                    self._look_for_hang()
            if self.store is not None:
                if self.failure:
                    report(self.store, self.failure)
                leave(self.store, self.rank)
        except dist.DistError:
            self.store_gone_at = time.monotonic()  # its owner, torchrun, ends this process, or _watch_self does

    def _attend(self) -> None:
        """Beats, reports ranks of this machine that are gone, and ends this process after another's failure."""
        self._beat()
        if self.store is None:
            return
        for rank in [rank for rank in self.unknown if self.store.check([f"beat/{rank}"])]:
            self.pids[rank] = self._heartbeat(rank).pid
            self.unknown.remove(rank)
        for rank in [rank for rank, pid in self.pids.items() if has_ended(pid)]:
            report_gone(self.store, rank, self.pids.pop(rank))
        grace = SAVING_S if self.phase == "save" else GRACE_S
        if time.monotonic() - self.failed_at > grace and not self.stopped.is_set():
            why = reported(self.store).text
            where = f"step {self.step}" if self.step else "at the start"
            self._end(f"{where}: {why}" if RESUMES in why else f"{where}: {why.rstrip('.')}. {RESUMES}")

    def _look_for_hang(self) -> None:
        """Compares heartbeats of all ranks, some seconds apart, and ends this process if one of the others is to blame."""
        assert self.store is not None
        stuck, before = (self.step, self.phase), self._heartbeats()
        end = time.monotonic() + 3 * max(self.interval, self.timeout / 15)
        while time.monotonic() < end and not self.stopped.wait(self.interval):
            self._attend()
        now = self._heartbeats()
        if self.stopped.is_set() or (self.step, self.phase) != stuck:
            return
        # A rank that is done answers no more: no reason to end one that still writes.
        done = all(self.store.check([f"left/{rank}"]) for rank in silent(before, now))
        if done and any(beat.phase in UNLIMITED for beat in now if beat):
            return
        why = diagnosis(before, now, self.rank)
        report(self.store, Failure(f"rank {self.rank} on {socket.gethostname()} has ended: {why}", True))
        leave(self.store, self.rank)
        self._kill(now[rank] for rank in silent(before, now))
        self._end(why)

    def _watch_self(self) -> None:
        """Ends this rank where it stands still, and the store is gone, does not answer, or SIGTERM has come long ago."""
        limit = 0.9 * float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))  # then the launcher would kill it
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            if self.asked_at + limit < now and self.since < self.asked_at and self.phase not in UNLIMITED:
                waited = f"step {self.step}: has stood still for {now - self.since:.0f} s"
                self._end(f"{waited}, since before SIGTERM came: ended without a checkpoint. {RESUMES}", "failed")
            if self.store_gone_at < now:
                patience = self.timeout if self.phase in UNLIMITED else min(self.timeout, STORE_GONE_S)
                if now - max(self.store_gone_at, self.since) > patience:
                    waited = f"step {self.step}: has stood still for {now - self.since:.0f} s"
                    self._end(f"{waited}, and the launcher of rank 0 is gone with the store of all ranks. {RESUMES}")
                write_heartbeat(self.step, 2 * self.timeout, self.taken)
            elif (silence := now - self.answered) > 1.5 * self.timeout:
                # A call to a store whose host is cut off may block for a quarter of an hour.
                self._end(
                    f"step {self.step}: the node of rank 0 does not answer for {silence:.0f} s: it is gone, or the network. "
                    f"{RESUMES}"
                )

    def _end(self, why: str, state: Literal["lost", "failed"] = "lost") -> None:
        # Not logged: the thread that hangs may hold the lock of a log handler.
        print(f"error (rank {self.rank}): {why}", file=sys.stderr, flush=True)
        write_rank_status(state, why)
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
        failed = self.store.check([FAILED])
        self.answered = time.monotonic()
        if failed:
            self.failed_at = min(self.failed_at, self.answered)

    def _heartbeats(self) -> list[Heartbeat | None]:
        """The ranks' last heartbeats, None of one that has not begun."""
        assert self.store is not None
        return [self._heartbeat(rank) if self.store.check([f"beat/{rank}"]) else None for rank in range(self.ranks)]

    def _heartbeat(self, rank: int) -> Heartbeat:
        assert self.store is not None
        return Heartbeat(*json.loads(self.store.get(f"beat/{rank}")))


def watch_ranks(timeout: float) -> HangWatch:
    """A watch over the ranks of the process group. timeout: seconds. Every rank calls it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return HangWatch(None, rank, ranks, timeout)
    store = default_store()
    store.set_timeout(timedelta(seconds=timeout))
    # A process group may see several trainings, of which each has its own keys, as each attempt of torchrun has.
    store = dist.PrefixStore(f"watch_{store.add(f'watches/{rank}', 1)}", store)
    first = rank - int(os.environ.get("LOCAL_RANK", 0))
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return HangWatch(store, rank, ranks, timeout, [other for other in local if other != rank])


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
    end = f" It is ended; {RESUMES}"
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
