"""This machine: a job in the background, under a supervisor that writes its log and how it ended."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from features.errors import UserError
from features.plain_json import read_json
from features.printable import printable
from pipeline.cluster.base import Cluster, Status, Workload, command, of_rank, state_folder
from pipeline.cluster.supervisor import LOCK, LOG, OUTCOME, Outcome
from pipeline.storage.files import make_folder, storage_of

POLL_S = 0.2
MAX_OUTCOME_BYTES = 1 << 12


class Local(Cluster):
    """This machine.

    Attributes:
        folder: of the logs, a folder a submission; None: taskfuse/jobs in XDG_STATE_HOME or ~/.local/state.
        working_folder: that jobs start in; None: that of the submission.
    """

    backend: Literal["local"] = "local"
    folder: Path | None = None
    working_folder: Path | None = None

    def pinned(self) -> dict[str, Any]:
        """See Cluster."""
        return {"folder": str(self._folder()), "working_folder": str(self.of_job(Path()))}

    def of_job(self, path: Path) -> Path:
        """A path on a job's command line, absolute."""
        return (self.working_folder or Path()).absolute() / path

    def render(self, work: Workload) -> str:
        """The command line, quoted for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*variables, shlex.join(_command(work))]) + "\n"

    def submit(self, work: Workload) -> str:
        """Starts the supervisor in a session of its own. Returns the folder of the log."""
        for setting in ("after", "array", "schedule", "suspend"):
            if getattr(work, setting):
                raise UserError(
                    f"{setting} needs a scheduler, and cluster={self.backend} is this machine: leave it out"
                )
        words = _command(work)
        folder, start = self._folder() / work.name, self.of_job(Path())
        if not start.is_dir():
            raise UserError(f"{start}, the working folder of the job, is gone: set cluster.working_folder")
        if (folder / LOG).exists():
            raise UserError(f"{folder} is the folder of an earlier job: choose another name=, or remove it")
        make_folder(folder)
        final = ",".join(map(str, work.kind.final))
        seconds = math.inf if work.service else work.time_limit_s
        limits = [str(seconds), str(work.grace_s), str(0 if work.kind.launched else work.retries), final]
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cluster.supervisor", str(folder), *limits, *words],
            env={**os.environ, **self.environment}, cwd=start, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        started = lambda: (folder / LOG).exists() or supervisor.poll() is not None  # noqa: E731
        _wait_until(started, 30, f"{folder}: the job's supervisor did not start")
        if not (folder / LOG).exists():
            raise UserError(f"{folder}: the job's supervisor could not start, with exit code {supervisor.returncode}")
        return str(folder)

    def _folder(self) -> Path:
        return (self.folder or state_folder() / "jobs").absolute()

    def status(self, work: Workload, native: str) -> Status:
        """Running while the supervisor lives; then what it wrote last."""
        folder = Path(native)
        if not (folder / LOG).exists():
            raise UserError(f"{work.name}: {folder} is gone, and with it what is known of this job")
        if _pid(folder) is not None:
            return Status("running", f"pid {_pid(folder)}")
        try:
            outcome = Outcome(**read_json(folder, OUTCOME, MAX_OUTCOME_BYTES))
        except FileNotFoundError:
            return Status("failed", "ended without an exit code: killed, or this machine was restarted")
        if outcome.stopped:
            why = ", since time_limit_s was over" if outcome.overdue else ""
            return Status("stopped", f"exit code {outcome.code}{why}", outcome.restarts)
        return Status("failed" if outcome.code else "succeeded", f"exit code {outcome.code}", outcome.restarts)

    def logs(self, work: Workload, native: str, rank: int | None, follow: bool) -> Iterator[str]:  # noqa: ARG002
        """The lines of the log; with `rank` those that name it."""
        folder, left = Path(native), ""
        with (folder / LOG).open(errors="replace", newline="\n") as file:
            while True:
                running = follow and _pid(folder) is not None
                lines = (left + file.read()).split("\n")
                left = lines.pop()
                for line in lines + ([left] if left and not running else []):
                    if rank is None or of_rank(line, rank):
                        yield printable(line.replace("\t", " "))
                if not running:
                    return
                time.sleep(POLL_S)

    def stop(self, work: Workload, native: str) -> None:
        """SIGTERM to the supervisor, which passes it on and kills what is left after `grace_s`."""
        folder = Path(native)
        if (pid := _pid(folder)) is None:
            raise UserError(f"{work.name} has ended: there is nothing to stop")
        os.kill(pid, signal.SIGTERM)
        _wait_until(lambda: _pid(folder) is None, work.grace_s + 30, f"{work.name}: pid {pid} does not end")


def _command(work: Workload) -> list[str]:
    """The words that run the job with the Python that runs this one."""
    if work.nodes.least > 1:
        raise UserError(
            f"nodes is {work.nodes}, and this machine is one: raise ranks_per_node, or choose another cluster="
        )
    config_dir = str(work.config_dir.absolute()) if work.config_dir else None
    one = work.model_copy(update={"nodes": work.nodes._replace(most=1)})
    return command(one, sys.executable, config_dir=config_dir)


def _pid(folder: Path) -> int | None:
    """The supervisor's pid while it lives: it holds the lock of its file until it ends, however it does."""
    file = folder / LOCK
    try:
        lock = storage_of(file).lock(file, wait=False, create=False)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int(file.read_text() or 0) or None
    lock.release()
    return None


def _wait_until(done: Callable[[], bool], seconds: float, otherwise: str) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise UserError(otherwise)
        time.sleep(0.05)
