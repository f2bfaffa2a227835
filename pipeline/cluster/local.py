"""This machine: the job takes over the process that submits it."""

import os
import shlex
import sys
from collections.abc import Iterator
from typing import NoReturn

from features.errors import UserError
from pipeline.cluster.base import Status, Workload


class Local:
    """Runs a job in the foreground: signals and the exit code are its own, so there is nothing to follow afterwards."""

    def render(self, work: Workload) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(_command(work)) + "\n"

    def submit(self, work: Workload) -> NoReturn:
        """Replaces this process by the job."""
        command = _command(work)
        os.execv(command[0], command)

    def status(self, work: Workload) -> Status:
        """Raises UserError: a local job is its own process."""
        raise _foreground(work, "its status is its exit code")

    def logs(self, work: Workload) -> Iterator[str]:
        """Raises UserError: a local job is its own process."""
        raise _foreground(work, "its log is its own output")

    def stop(self, work: Workload) -> None:
        """Raises UserError: a local job is its own process."""
        raise _foreground(work, "press Ctrl-C or send it SIGTERM")


def _command(work: Workload) -> list[str]:
    """The words that run the job with the Python that runs this one."""
    if work.nodes > 1:
        raise UserError(
            f"nodes is {work.nodes}, and cluster=local is one node: raise ranks_per_node, or set cluster=k8s"
        )
    launcher = ["-m", "jobs.launch", f"--nproc-per-node={work.ranks_per_node}"]
    return [sys.executable, *(launcher if work.job == "train" else []), "-m", f"jobs.{work.job}", *work.args]


def _foreground(work: Workload, instead: str) -> UserError:
    return UserError(f"cluster=local runs {work.job} in the foreground of the terminal that started it: {instead}")
