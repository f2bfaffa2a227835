"""What a command costs with all processes that it starts: seconds, CPU seconds, peak memory."""

import os
import re
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY = 0.05  # seconds between looks at the memory


@dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
        seconds: on the clock.
        cpu_seconds: user and system, of the process and of all that it waited for.
        peak_bytes: largest memory of one process, or of all together (pages that they share count once).
        output: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    """Runs a command in a folder until it ends. Raises SystemExit with its last lines if it fails."""
    peak = 0
    with tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, _memory(process.pid))
            time.sleep(EVERY)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(text.splitlines()[-8:]))
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak, text)


def _memory(pid: int) -> int:
    """Bytes: of one process alone the most that it ever had, of several what they have now."""
    with suppress(psutil.Error, OSError):
        root = psutil.Process(pid)
        children = root.children(recursive=True)
        if not children:
            # Not the ru_maxrss of wait4: the kernel takes that over from whoever started the process.
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            return int(found[1]) * 1024 if found else 0
        return sum(_proportional(process) for process in (root, *children))
    return 0


def _proportional(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return process.memory_full_info().pss
    return 0
