"""Supervisor of a local job: python -m pipeline.cluster.supervisor FOLDER TIME_LIMIT_S GRACE_S RETRIES FINAL COMMAND...

It runs the command with its output in FOLDER/log, again after exit code 75 and after up to RETRIES other failures, passes
SIGTERM on, and writes FOLDER/outcome.json when all is over. As long as it lives it holds the lock of FOLDER/pid; no process
of the job outlives an attempt, and SIGTERM reaches the job if the supervisor is killed itself.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.processes import adopt, children, end_with
from pipeline.storage.files import storage_of, write_json

LOG, LOCK, OUTCOME = "log", "pid", "outcome.json"
PREEMPTED = os.EX_TEMPFAIL
LONGEST_PAUSE_S = 60


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        code: its exit code. stopped: by a person, or since its time was over. restarts: how often it was started again.
        overdue: its time was over.
    """

    code: int
    stopped: bool
    restarts: int
    overdue: bool = False


class Supervisor:
    """One job.

    Args:
        command: its words. time_limit_s: of all attempts. grace_s: between SIGTERM and SIGKILL.
    """

    def __init__(self, command: list[str], time_limit_s: float, grace_s: float) -> None:
        self.command, self.grace_s = command, grace_s
        self.stopped, self.overdue, self.until = False, False, time.monotonic() + time_limit_s
        self.process: subprocess.Popen[bytes] | None = None
        self.killed_at = float("inf")
        self.libc = ctypes.CDLL(None)
        adopt(self.libc)
        signal.signal(signal.SIGTERM, lambda *_: self.stop())

    def stop(self) -> None:
        """Asks the job to end."""
        if not self.stopped:
            self.stopped, self.killed_at = True, time.monotonic() + self.grace_s
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def attempt(self) -> int:
        """Runs the command once. Returns its exit code, as a shell has it for a signal."""
        parent, libc = os.getpid(), self.libc
        self.process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=lambda: end_with(parent, libc))
        if self.stopped:  # while there was no process
            self.process.send_signal(signal.SIGTERM)
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(0.2)
                self._end_orphans()
                return code if code >= 0 else 128 - code
            if time.monotonic() > self.until and not self.stopped:
                print("error: time_limit_s is over: ended by SIGTERM", file=sys.stderr, flush=True)
                self.overdue = True
                self.stop()
            if time.monotonic() > self.killed_at:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def _end_orphans(self) -> None:
        """Ends what the job has left, such as the ranks of a launcher that was killed: they would work on unwatched."""
        until, signalled = min(self.killed_at, time.monotonic() + self.grace_s), set[int]()
        while left := set(children()):
            killed = time.monotonic() > until
            for pid in left if killed else left - signalled:
                os.kill(pid, signal.SIGKILL if killed else signal.SIGTERM)
            signalled |= left
            time.sleep(0.05)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def run(self, retries: int, final: set[int]) -> Outcome:
        """Runs the command until it has succeeded, failed for good, or was stopped."""
        restarts = failures = 0
        while True:
            code = self.attempt()
            failures += code != PREEMPTED
            again = code == PREEMPTED or (code not in final and failures <= retries)
            if code == 0 or self.stopped or not again:
                return Outcome(code, self.stopped, restarts, self.overdue)
            restarts += 1
            print(f"exit code {code}: started again", file=sys.stderr, flush=True)
            self._pause(min(0.1 * 2**restarts, LONGEST_PAUSE_S))
            if self.stopped:
                return Outcome(code, self.stopped, restarts, self.overdue)

    def _pause(self, seconds: float) -> None:
        """Before another attempt: a job that always ends at once would keep the machine busy."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stopped:
            time.sleep(0.05)


def main() -> None:
    """Runs the job that the command line names."""
    folder, time_limit_s, grace_s, retries, final, *command = sys.argv[1:]
    file = Path(folder, LOCK)
    file.touch()
    lock = storage_of(file).lock(file, wait=True, create=False)
    file.write_text(str(os.getpid()))
    log = os.open(Path(folder, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    supervisor = Supervisor(command, float(time_limit_s), float(grace_s))
    outcome = supervisor.run(int(retries), {int(code) for code in final.split(",") if code})
    write_json(Path(folder, OUTCOME), outcome._asdict())
    lock.release()


if __name__ == "__main__":
    main()
