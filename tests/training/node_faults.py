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
MEETING = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4,read_timeout=30,join_timeout=120"
SCRIPT = Path(__file__).parent / "faulty_run.py"
PATIENCE = 120


class Job:
    """A run with a launcher on each of some hosts, one rank each; the first host holds the rendezvous.

    Args:
        folder: of the dataset `data`. nodes: --nnodes. pause: seconds of a step.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        hosts: list[Host],
        nodes: str,
        restarts: int = 3,
        pause: float = 0.2,
        **settings: Any,
    ) -> None:
        self.folder, self.name, self.hosts = folder, name, hosts
        self.nodes, self.restarts, self.pause = nodes, restarts, pause
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
        command += [f"--max-restarts={self.restarts}", "--rdzv-backend=c10d", f"--rdzv-conf={MEETING}"]
        command += [f"--rdzv-endpoint={self.hosts[0].name}:29400", f"--rdzv-id={self.name}"]
        command += [str(SCRIPT), str(self.folder), self.name, "0", json.dumps(self.settings), "[]"]
        environment = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "PYTHONPATH": PATHS, "PAUSE": str(self.pause)}
        self.logs[host.name] = self.folder / f"{self.name}.{host.name}.log"
        with self.logs[host.name].open("a") as log:
            launcher = host.start(*command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=str(self.folder))
        self.launchers[host.name] = launcher

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

    def trains(self, ranks: int, after: float = 0.0, steps: int = 1) -> dict[str, Any]:
        """Waits until that many ranks have all taken some steps since a time; returns the first line of them."""

        def found() -> dict[str, Any] | None:
            lines = [line for line in self.lines() if line["time"] > after and line["ranks"] == ranks]
            whole = [
                step for step, count in Counter((x["attempt"], x["step"]) for x in lines).items() if count == ranks
            ]
            return min(lines, key=lambda line: line["time"]) if len(whole) >= steps else None

        found_line: dict[str, Any] = self.wait(found, f"{ranks} ranks do not train")
        return found_line

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
        command = ["ip", "netns", "pids", host.namespace]
        pids = set(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
        newest = max((line for line in self.lines() if line["pid"] in pids), key=lambda line: line["time"])
        return int(newest["pid"])

    def last_time(self) -> float:
        """When the last step was taken."""
        return max(line["time"] for line in self.lines())

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

    def taken_twice(self, before: float, again: dict[str, Any]) -> int:
        """How many steps were taken again: by the first line after a fault, of those taken until `before`."""
        return max(0, max(line["step"] for line in self.lines() if line["time"] <= before) - again["step"] + 1)

    def close(self) -> None:
        """Kills what is left."""
        for launcher in self.launchers.values():
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
