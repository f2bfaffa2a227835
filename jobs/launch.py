"""jobs.launch: torchrun, with an exit code that tells preemption from failure.

torchrun exits with 1 whatever its ranks do once one receives SIGTERM. This one exits with 75 if all ranks of this machine
have saved their work in a checkpoint or had none yet, with 0 if they were done nevertheless; arguments are torchrun's.
Between SIGTERM and SIGKILL they have 600 s, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT. A rank that stops beating for train.timeout
is killed, also where it is the only one.

Examples:
  python -m jobs.launch --nproc-per-node=2 -m jobs.train dataset=runs/demo/data model=ple run=runs/demo/ple
  python -m jobs.launch --nproc-per-node=8 --max-restarts=3 -m jobs.train dataset=D model=adatt run=R
  python -m jobs.launch --nnodes=8 --node-rank=N --master-addr=HOST0 --nproc-per-node=8 -m jobs.train dataset=D run=R

One node, also by --standalone, listens on 127.0.0.1 alone, at --master-port or a free port; its other flags of
the rendezvous have no effect. Several need a network that is trusted whole, or rules (on Kubernetes a NetworkPolicy) by which
only this job's nodes reach each other's ports: clients are not authenticated. Node 0 listens on the one address that
--master-addr is there, or prints that it listens on all (--master-addr=0.0.0.0 on node 0 is all). --rdzv-backend=c10d, for a
number of nodes that changes, unpickles what arrives at its port: anyone who can connect can execute code on every node.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from features.errors import UserError
from pipeline.terminal import escape_output
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import STATUS_FOLDER, RankStatus, read_rank_statuses, silent_ranks

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main() -> None:
    """Runs torchrun in this process, and reads its ranks' statuses where not all of them exited with 0."""
    escape_output()
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(f"{__doc__.strip()}\n")
    # Until torchrun has ranks, which it may wait minutes for, and takes the signal itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record

    from pipeline.training.parallel import rendezvous

    options = run.get_args_parser().parse_args()
    try:
        store = rendezvous.choose(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STATUS_FOLDER] = folder
        end_while_waiting(Path(folder))
        threading.Thread(target=end_silent_ranks, args=(Path(folder),), daemon=True, name="heartbeats").start()
        try:
            record(run.run)(options)
        except SignalException as error:
            sys.exit(after_signal(error.sigval.name, read_rank_statuses(Path(folder))))
        except ChildFailedError as error:
            sys.exit(after_failure(error.failures, read_rank_statuses(Path(folder))))
    del store  # only now: torchrun's static rendezvous shares its server


def end_while_waiting(folder: Path) -> None:
    """Lets SIGTERM end this process in a wait for other nodes too: that is in C, where Python runs no handler of signals.

    Once torchrun handles the signal, nothing happens here.

    Args:
        folder: to remove then.
    """
    handler = signal.getsignal(signal.SIGTERM)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def wait() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(PREEMPTED)

    threading.Thread(target=wait, daemon=True, name="preemption").start()


def end_silent_ranks(folder: Path) -> None:
    """Kills ranks of this machine that have stopped beating: torchrun then restarts them, or ends."""
    while True:
        time.sleep(1)
        for rank, age in silent_ranks(folder):
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
                print(
                    f"error: pid {rank.pid}, at step {rank.step}: no heartbeat for {age:.0f} s: "
                    "killed. --max-restarts=N resumes from the newest checkpoint.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def after_signal(name: str, statuses: list[RankStatus]) -> int | str:
    """The exit code after torchrun was ended by a signal. A rank without a status had nothing to lose.

    Args:
        name: of the signal. statuses: of the last attempt.
    """
    states = [status.state for status in statuses]
    if "started" in states:
        return f"error: ended by {name} before all ranks had written a checkpoint; the newest one is kept"
    if statuses and states == ["finished"] * statuses[0].ranks:
        return 0
    return PREEMPTED


def after_failure(failures: "dict[int, ProcessFailure]", statuses: Iterable[RankStatus]) -> int | str:
    """The exit code after ranks have exited with another code than 0; those that failed have printed their error.

    Args:
        failures: by rank. statuses: of the last attempt.
    """
    states = {status.pid: status.state for status in statuses}

    def lost_nothing(failure: "ProcessFailure") -> bool:
        if failure.pid not in states and failure.exitcode == -signal.SIGTERM:
            return True  # it was importing still
        return failure.exitcode == PREEMPTED or states.get(failure.pid) == "preempted"

    if all(map(lost_nothing, failures.values())):
        return PREEMPTED
    killed = {rank: f for rank, f in failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if not killed:
        return 1
    ranks = ", ".join(f"rank {rank} by {failure.signal_name()}" for rank, failure in killed.items())
    return f"error: killed: {ranks}. The kernel sends SIGKILL where memory runs out. The newest checkpoint is kept."


if __name__ == "__main__":
    main()
