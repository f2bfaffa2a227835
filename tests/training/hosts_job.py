"""Runs of faulty_run.py over hosts (tests/hosts.py) that come and go, for test_nodes.py and tests/benchmarks/node_faults.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hosts import Host
from tiny_training import PATHS, TRAIN_ROWS

EPOCH = 13
MEETING = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4,join_timeout=120"
SCRIPT = Path(__file__).parent / "faulty_run.py"
PATIENCE = 120


class Job:
    """A run with a launcher on each of some hosts, one rank each; the first host holds the rendezvous.

    Args:
        folder: of the dataset `data`. nodes: --nnodes. pause: seconds of a step. read_timeout: seconds without an answer after
            which the rendezvous is lost. settings: of train.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        hosts: list[Host],
        nodes: str,
        restarts: int = 3,
        pause: float = 0.2,
        read_timeout: int = 30,
        **settings: Any,
    ) -> None:
        self.folder, self.name, self.hosts = folder, name, hosts
        self.nodes, self.restarts, self.pause, self.read_timeout = nodes, restarts, pause, read_timeout
        self.attempt = 0
        self.settings = {
            "checkpoint_every": 10,
            "timeout": 5,
            "epochs": 100,
            "max_steps": 1300,
            "log_every": 10,
        } | settings
        self.launchers: dict[str, subprocess.Popen[str]] = {}
        self.logs: dict[str, Path] = {}

    def start(self, host: Host) -> None:
        """Starts a launcher on a host, in place of one that has ended."""
        command = [sys.executable, "-m", "jobs.launch", f"--nnodes={self.nodes}", "--nproc-per-node=1"]
        command += [
            f"--max-restarts={self.restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-conf={MEETING},read_timeout={self.read_timeout}",
        ]
        command += [f"--rdzv-endpoint={self.hosts[0].name}:29400", f"--rdzv-id={self.name}"]
        command += [str(SCRIPT), str(self.folder), self.name, str(self.attempt), json.dumps(self.settings), "[]"]
        environment = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "PYTHONPATH": PATHS, "PAUSE": str(self.pause)}
        file = self.folder / f"{self.name}.{host.name}.log"
        file.touch()  # another thread may read all logs
        self.logs[host.name] = file
        with file.open("a") as log:
            launcher = host.start(*command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=str(self.folder))
        self.launchers[host.name] = launcher

    def start_all(self) -> None:
        """Starts launchers on all hosts, where none runs any more."""
        self.attempt += 100  # each command counts the starts of its ranks from 0
        for host in self.hosts:
            self.start(host)

    def lines(self) -> list[dict[str, Any]]:
        """What the ranks have written of their steps, whole lines."""
        found = []
        for file in (self.folder / f"{self.name}.seen").glob("*.jsonl"):
            found += [json.loads(x) for x in file.read_text().splitlines(keepends=True) if x.endswith("\n")]
        return found

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits until a condition holds and returns it; fails, with the logs, after PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, f"{what}\n{self.log()}"
            time.sleep(0.05)
        return found

    def trains(self, ranks: int, steps: int = 1, after: int = -1) -> dict[str, Any]:
        """Waits until that many ranks have all taken some steps; returns the first line of them.

        Args:
            after: an attempt, before those that count.
        """

        def found() -> dict[str, Any] | None:
            lines = [line for line in self.lines() if line["attempt"] > after and line["ranks"] == ranks]
            whole = [key for key, count in Counter((x["attempt"], x["step"]) for x in lines).items() if count == ranks]
            return min(lines, key=lambda line: line["time"]) if len(whole) >= steps else None

        found_line: dict[str, Any] = self.wait(found, f"{ranks} ranks do not train")
        return found_line

    def newest(self) -> int:
        """The newest attempt that has taken a step."""
        return max((line["attempt"] for line in self.lines()), default=-1)

    def end_of(self, host: Host) -> int:
        """Waits for a launcher's end; its exit code."""
        launcher = self.launchers[host.name]
        self.wait(lambda: launcher.poll() is not None, f"{host.name} does not end")
        return launcher.returncode

    def terminate(self, host: Host) -> None:
        """Sends SIGTERM to the launcher alone."""
        self.launchers[host.name].send_signal(signal.SIGTERM)

    def log(self, host: Host | None = None) -> str:
        """What a launcher and its ranks have printed, or all have."""
        logs = [self.logs[host.name]] if host else list(self.logs.values())
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)

    def rank_of(self, host: Host) -> int:
        """The pid of the rank on a host, the newest one."""
        pids = processes(host)
        newest = max((line for line in self.lines() if line["pid"] in pids), key=lambda line: line["time"])
        return int(newest["pid"])

    def starts(self) -> None:
        """Waits until the launcher of each host has started its rank."""
        script = str(SCRIPT).encode()

        def is_rank(pid: int) -> bool:
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                return script in words and b"jobs.launch" not in words
            return False

        self.wait(lambda: all(any(map(is_rank, processes(host))) for host in self.hosts), "no ranks start")

    def account(self) -> tuple[int, int, int]:
        """Rows of the whole epochs up to the last step that its history misses, that it holds twice, and steps that it misses.

        A step's history is that of the attempt that took it last.
        """
        lines = self.lines()
        last: dict[int, int] = {}
        for line in lines:
            last[line["step"]] = max(last.get(line["step"], -1), line["attempt"])
        final = [line for line in lines if line["attempt"] == last[line["step"]]]
        seen = Counter(((line["step"] - 1) // EPOCH, row) for line in final for row in line["rows"])
        epochs = max(last) // EPOCH
        gone = epochs * TRAIN_ROWS - sum(epoch < epochs for epoch, _ in seen)
        return gone, sum(count > 1 for count in seen.values()), max(last) - len(last)

    def taken_again(self) -> int:
        """How many steps were taken more than once: those behind a checkpoint that were lost."""
        taken = {(line["step"], line["attempt"]) for line in self.lines()}
        return len(taken) - len({step for step, _ in taken})

    def close(self) -> None:
        """Kills what is left."""
        for launcher in self.launchers.values():
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()


def processes(host: Host) -> set[int]:
    """The pids of all processes on a host."""
    command = ["ip", "netns", "pids", host.namespace]
    return set(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
