"""A standalone Spark cluster on loopback for tests, workers of a core each; `python spark_cluster.py FOLDER` runs one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pyspark
from s3_server import free_ports

SPARK = Path(pyspark.__file__).parent


def why_not() -> str | None:
    """Why there can be no cluster here."""
    return None if shutil.which("java") or os.environ.get("JAVA_HOME") else "Spark needs Java, and there is none"


class SparkCluster:
    """Its processes end with kill().

    Args:
        folder: of logs and of executors' files.
        env: what workers have in their environment, and executors get from them.
    """

    def __init__(self, folder: Path, env: dict[str, str], workers: int = 2) -> None:
        self.folder, self.wanted = folder, workers
        # Quick starts rather than speed: no second compiler, one thread that collects garbage.
        java = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto"
        self.env = os.environ | env | {
            "SPARK_HOME": str(SPARK), "SPARK_DAEMON_MEMORY": "128m",
            "SPARK_DAEMON_JAVA_OPTS": java, "SPARK_NO_DAEMONIZE": "1",
        }  # fmt: skip
        self.port, self.page = free_ports(2)
        self.master = f"spark://127.0.0.1:{self.port}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> "SparkCluster":
        """Starts it and waits until the master knows its workers."""
        self._run("127.0.0.1", "master.Master", "--port", str(self.port), "--webui-port", str(self.page))
        end = time.monotonic() + 90
        # A worker that finds no master tries again only after 5 to 15 s.
        while not self._listens():
            assert time.monotonic() < end, f"no Spark master: see {self.folder}"
            time.sleep(0.05)
        for number in range(self.wanted):
            work = self.folder / f"worker-{number}"
            work.mkdir(parents=True)
            host = f"127.0.0.{number + 1}"  # Spark runs a twin of a task on another host only
            self._run(host, "worker.Worker", self.master, "--cores", "1", "--memory", "1g", "--work-dir", str(work),
                      "--webui-port", "0")  # fmt: skip
        while self.alive() < self.wanted:
            assert time.monotonic() < end, f"no Spark cluster: see {self.folder}"
            assert all(process.poll() is None for process in self.processes), f"Spark ended: see {self.folder}"
            time.sleep(0.2)
        return self

    def _run(self, host: str, role: str, *arguments: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            command = [SPARK / "bin" / "spark-class", f"org.apache.spark.deploy.{role}", *arguments, "--host", host]
            self.processes.append(
                subprocess.Popen(
                    command, env=self.env | {"SPARK_LOCAL_IP": host}, stdout=log, stderr=log, start_new_session=True
                )
            )

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            return True
        return False

    def alive(self) -> int:
        """Workers that the master knows."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/json/", timeout=5) as answer:
                return json.load(answer)["aliveworkers"]
        except OSError:
            return 0

    def executors(self) -> list[psutil.Process]:
        """The Java processes that run tasks."""
        children = [
            child for process in self.processes for child in psutil.Process(process.pid).children(recursive=True)
        ]
        return [child for child in children if "CoarseGrainedExecutorBackend" in " ".join(_command(child))]

    def kill(self) -> None:
        """Ends all processes, executors and their Pythons among them."""
        for process in self.processes:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                _kill(child.pid)
            _kill(process.pid)
            process.wait()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Runs one until stdin closes, and prints its address. FOLDER [WORKERS]"""
    cluster = SparkCluster(Path(sys.argv[1]).absolute(), {}, int(sys.argv[2]) if len(sys.argv) > 2 else 2).start()
    print(cluster.master, flush=True)
    try:
        sys.stdin.read()
    finally:
        cluster.kill()


if __name__ == "__main__":
    main()
