"""Runs of chaos.py over two hosts, of which the first holds the rendezvous."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from chaos_judge import DROPOUT, SETTINGS, STEPS, Outcome, judge, unclean
from hosts import Host, hosts
from hosts_job import Job, processes

from pipeline.run.run import Run

PAUSE_S, READ_TIMEOUT_S, LIMIT_S = 0.15, 12, 300
AGAIN_S = 3  # until a scheduler gives a command again
UNHURT_S = 25  # without a step, after which the next fault comes whatever the run does


class Chaos:
    """A run over hosts, and the scheduler that starts its launchers.

    Attributes:
        later: (time, act) of what comes by itself, such as a link that is restored.
    """

    def __init__(self, folder: Path, name: str, pair: list[Host], elastic: bool) -> None:
        settings = SETTINGS | {"timeout": 5, "dropout": 0 if elastic else DROPOUT}
        self.job = Job(
            folder, name, pair, "1:2" if elastic else "2", pause=PAUSE_S, read_timeout=READ_TIMEOUT_S, **settings
        )
        self.outcome, self.run = Outcome(name), Run(folder / name)
        self.first, self.second = pair
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.ended: dict[str, float] = {}
        self.read: dict[str, int] = {}

    def start(self, host: Host) -> None:
        """Gives the command on a host."""
        self.job.start(host)
        self.ended.pop(host.name, None)
        self.outcome.commands += 1

    def add(self, host: Host) -> None:
        """Gives the command on a host where it runs not yet."""
        if host.name not in self.job.launchers:
            self.start(host)

    def reap(self) -> bool:
        """Looks at the launchers, starts again those that have ended; True once the run is finished and none is left."""
        for host in (self.first, self.second):
            launcher = self.job.launchers.get(host.name)
            if launcher and launcher.poll() is not None and host.name not in self.ended:
                self.ended[host.name] = time.monotonic()
                log = self.job.logs[host.name].read_text()
                code = -signal.SIGKILL if launcher.returncode == 128 + signal.SIGKILL else launcher.returncode
                self.outcome.wrong += unclean(code, log[self.read.get(host.name, 0) :])
                self.read[host.name] = len(log)
        gone = [host for host in (self.first, self.second) if host.name in self.ended]
        if len(gone) == len(self.job.launchers):
            status = self.run.status()
            if status is not None and status.state == "finished":
                return True
            self.job.launchers, self.ended = {}, {}
            for host in self.job.hosts:
                host.reconnect()
            self.outcome.commands += len(self.job.hosts)
            self.job.start_all()
        elif gone == [self.second] and time.monotonic() - self.ended[self.second.name] > AGAIN_S:
            self.start(self.second)
        return False

    def inject(self, fault: str, rng: random.Random) -> None:
        """Does one of FAULTS."""
        self.outcome.faults[fault] += 1
        FAULTS[fault](self, rng)

    def rank(self, number: signal.Signals, host: Host) -> None:
        """A signal to the rank of a host, if it has one that has taken a step."""
        with suppress(ProcessLookupError, ValueError):
            os.kill(self.job.rank_of(host), number)

    def cut(self, host: Host, seconds: float) -> None:
        """Cuts a link, for some seconds."""
        host.cut()
        self.later.append((time.monotonic() + seconds, host.reconnect))

    def lines(self) -> list[tuple[float, int]]:
        """When steps were taken, and which."""
        return sorted((line["time"], line["step"]) for line in self.job.lines())


FAULTS: dict[str, Callable[[Chaos, random.Random], None]] = {
    "kill rank": lambda c, rng: c.rank(signal.SIGKILL, rng.choice([c.first, c.second])),
    "stop rank": lambda c, rng: c.rank(signal.SIGSTOP, rng.choice([c.first, c.second])),
    "kill node": lambda c, _: c.second.kill(),
    "kill rendezvous host": lambda c, _: c.first.kill(),
    "cut link shortly": lambda c, rng: c.cut(rng.choice([c.first, c.second]), rng.uniform(0.5, 3)),
    "cut link": lambda c, rng: c.cut(c.second, rng.uniform(8, 20)),
    "cut link of rendezvous host": lambda c, rng: c.cut(c.first, rng.uniform(8, 20)),
    "TERM a launcher": lambda c, rng: terminate(c, rng.choice([c.first, c.second])),
}


def terminate(chaos: Chaos, host: Host) -> None:
    """SIGTERM to the launcher of a host, if there is one."""
    if host.name in chaos.job.launchers:
        chaos.job.terminate(host)


def suffer(folder: Path, seed: int) -> Outcome:
    """A run over two hosts, with the faults that a seed draws."""
    rng = random.Random(seed)
    elastic = rng.random() < 0.6
    faults = rng.choices(list(FAULTS), k=rng.randint(4, 6))
    plan = [(step, rng.random() < 0.3, rng.uniform(0, 8), fault) for step, fault in zip(
        sorted(rng.sample(range(1, STEPS - 1), len(faults))), faults, strict=True)]  # fmt: skip
    begin, inject, first = time.monotonic(), time.time(), True
    with hosts("hA", "hB") as pair:
        chaos = Chaos(folder, f"hosts-{seed}", pair, elastic)
        outcome = chaos.outcome
        try:
            chaos.start(pair[0])
            if elastic:  # the other one is added
                chaos.later.append((time.monotonic() + rng.uniform(0, 12), lambda: chaos.add(pair[1])))
            else:
                chaos.start(pair[1])
            while not chaos.reap():
                if time.monotonic() - begin > LIMIT_S:
                    outcome.wrong.append(f"not finished after {LIMIT_S} s")
                    break
                now = time.monotonic()
                due, chaos.later = [x for x in chaos.later if x[0] <= now], [x for x in chaos.later if x[0] > now]
                for _, act in due:
                    act()
                if plan:
                    step, blind, seconds, fault = plan[0]
                    lines = [line for line in chaos.lines() if line[0] > inject]
                    reached = lines and lines[-1][1] >= step
                    waited = time.time() - inject
                    if (waited > seconds if blind and not first else reached) or waited > UNHURT_S:
                        del plan[0]
                        inject, first = time.time(), False
                        chaos.inject(fault, rng)
                time.sleep(0.05)
            outcome.wrong += [f"left: pid {pid}" for host in pair for pid in still_there(host)]
        finally:
            outcome.log = chaos.job.log()
            chaos.job.close()
    if not outcome.wrong or "not finished" not in outcome.wrong[-1]:
        judge(folder, outcome, [1, 2] if elastic else [2])
    outcome.seconds = time.monotonic() - begin
    return outcome


def still_there(host: Host) -> set[int]:
    """Processes on a host that are not gone soon."""
    end = time.monotonic() + 10
    while (found := processes(host)) and time.monotonic() < end:
        time.sleep(0.1)
    return found
