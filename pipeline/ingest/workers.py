"""Processes of this machine that do the work of a job's steps, for `workers=N` of the direct runner.

Beam's own worker processes take seconds to start, a fixed share of each step's work, and open ports. These take the next piece
of work when they are done with one, exchange messages with the job through pipes, and end with it.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Protocol

from pipeline.ingest.messages import Failure, Report
from pipeline.malloc import release_memory, tune_malloc
from pipeline.terminal import escape_output

# Does a piece of a step's work, given the step, the number of the piece and the work. It is pickled once a worker.
Do = Callable[[str, int, Any], Report | Failure]

COMMAND = [sys.executable, "-m", "pipeline.ingest.workers"]


class Submits(Protocol):
    """Workers, here or on other hosts (pipeline.ingest.runners.hosts)."""

    def submit(self, step: str, number: int, work: object) -> Future[Report | Failure]:
        """Has a piece of a step's work done, unless it was submitted before."""


RUNNING: list[Submits] = []  # of the job in this process: Beam pickles its functions, which find them here


class Workers:
    """Some processes, and a thread for each that waits for what it reports."""

    def __init__(self, count: int, do: Do) -> None:
        self.processes = [
            subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)
        ]
        self.idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(count)
        self.do = do
        self.begun: dict[tuple[str, int], Future[Report | Failure]] = {}
        self.know_what_to_do: set[int] = set()

    def submit(self, step: str, number: int, work: object) -> Future[Report | Failure]:
        """Has the next idle process do a piece of a step's work, unless it was submitted before."""
        if (step, number) not in self.begun:
            self.begun[step, number] = self.threads.submit(self._have_done, step, number, work)
        return self.begun[step, number]

    def _have_done(self, step: str, number: int, work: object) -> Report | Failure:
        process = self.idle.get()
        try:
            if process.pid not in self.know_what_to_do:
                _send(process, self.do)
                self.know_what_to_do.add(process.pid)
            _send(process, (step, number, work))
            report = _receive(process)
        except (EOFError, OSError):
            return Failure(
                f"a worker process ended in step {step} ({_end_of(process)}). Nothing was written: run again, with fewer "
                "workers or smaller unit_bytes and bucket_bytes if memory was short."
            )
        finally:
            self.idle.put(process)
        if isinstance(report, Exception):
            raise report
        return report

    def close(self) -> None:
        """Ends the processes."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not sent to a process that is gone
                    pipe and pipe.close()


def _send(process: subprocess.Popen[bytes], message: object) -> None:
    assert process.stdin is not None
    pickle.dump(message, process.stdin)
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> Any:
    """What a process reports. Raises EOFError where it has ended, or sends something else, for which it is ended."""
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)
    except (EOFError, OSError):
        raise
    except Exception as error:  # of what is no pickle, or the beginning of one, it raises anything
        process.kill()
        raise EOFError from error


def _end_of(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:  # alive, with its pipe closed
        process.kill()
        code = process.wait()
    return f"signal {-code}" if code < 0 else f"exit code {code}"


@contextmanager
def started(count: int, do: Do, step: str, first: Sequence[object]) -> Iterator[None]:
    """Worker processes, which RUNNING has meanwhile; they begin with the work of the first step, before Beam asks for it."""
    workers = Workers(count, do)
    RUNNING.append(workers)
    try:
        for number, work in enumerate(first):
            workers.submit(step, number, work)
        yield
    finally:
        RUNNING.remove(workers)
        workers.close()


def main() -> None:
    """What a worker process does: work from stdin, reports to what was stdout, until its job closes the pipe or is gone."""
    escape_output()
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no report
    tune_malloc()
    last_step = ""
    try:
        do = pickle.load(sys.stdin.buffer)
        while True:
            step, number, work = pickle.load(sys.stdin.buffer)
            if step != last_step:
                release_memory()
                last_step = step
            try:
                report: object = do(step, number, work)
            except Exception:  # a defect: raised where the job is, as text, since not every exception can be pickled
                report = RuntimeError(f"in a worker process, step {step}: {traceback.format_exc()}")
            pickle.dump(report, reports)
            reports.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # nobody waits for what is left


if __name__ == "__main__":
    main()
