"""jobs.launch: torchrun, with an exit code that tells preemption from failure.

torchrun exits with 1 whatever its ranks do once one receives SIGTERM. This one exits with 75 if all ranks of this machine
have saved their work in a checkpoint or had none yet, or wait for other nodes, also where another node received SIGTERM; with
0 if they were done nevertheless; arguments are torchrun's. Between SIGTERM and SIGKILL ranks have 600 s, or
TORCH_ELASTIC_SHUTDOWN_TIMEOUT. A rank that stops beating for train.timeout is killed, also where it is the only one.

--nnodes=2:8 trains on whatever nodes are there, 2 at least, 8 at most. A node that is lost costs the steps since the last
checkpoint and no restart of --max-restarts, which each node counts for its own ranks. A new node joins at the next checkpoint:
nothing is trained twice. All start the same command; where they meet, --rdzv-endpoint, is a host that stays to the end: the
others end with one line once it has not answered for 60 s (--rdzv-conf=read_timeout). A start waits 15 s for more nodes than
the least (last_call_timeout), a node 2 hours for a checkpoint (join_timeout); a silent one is gone after 15 s
(keep_alive_interval x keep_alive_max_attempt).

Examples:
  python -m jobs.launch --nproc-per-node=2 -m jobs.train dataset=runs/demo/data model=ple run=runs/demo/ple
  python -m jobs.launch --nproc-per-node=8 --max-restarts=3 -m jobs.train dataset=D model=adatt run=R
  python -m jobs.launch --nnodes=8 --node-rank=N --master-addr=HOST0 --nproc-per-node=8 -m jobs.train dataset=D run=R
  python -m jobs.launch --nnodes=2:8 --rdzv-endpoint=HOST0:29400 --nproc-per-node=8 -m jobs.train dataset=D run=R

One node, also by --standalone, listens on 127.0.0.1 alone, at --master-port or a free port; its other flags of
the rendezvous have no effect. Several need a network that is trusted whole, or rules (on Kubernetes a NetworkPolicy) by which
only this job's nodes reach each other's ports: clients are not authenticated. Node 0 listens on the one address that
--master-addr is there, or prints that it listens on all (--master-addr=0.0.0.0 on node 0 is all). --rdzv-backend=c10d, which a
number of nodes that changes takes, unpickles what arrives at its port: anyone who can connect can execute code on every node.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import Preempted, UserError, one_line
from pipeline.processes import children
from pipeline.terminal import escape_output
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import STATUS_FOLDER, RankStatus, read_rank_statuses, silent_ranks

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from pipeline.training.parallel.membership import Membership

LAST_WORDS_S = 3
END_BARRIER_S = 60  # that a node which is done waits for the others, before it closes the store


def main() -> None:
    """Runs torchrun in this process, and reads its ranks' statuses where not all of them exited with 0."""
    escape_output()
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what torch logs of lost connections are C++ stacks
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(f"{__doc__.strip()}\n")
    # Until torchrun has ranks, which it may wait minutes for, and takes the signal itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))

    from torch.distributed import run

    from pipeline.training.parallel import process_group, rendezvous

    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"  # of the ranks
    process_group.raise_file_limit()
    options = run.get_args_parser().parse_args()
    try:
        store = rendezvous.choose(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    with tempfile.TemporaryDirectory() as name:
        os.environ[STATUS_FOLDER] = name
        options.log_dir = options.log_dir or f"{name}/torchrun.logs"  # it would leave a folder behind with each start
        terminated = end_while_waiting(Path(name), alone=options.nnodes in ("1", "1:1"))
        code = launch(options, Path(name), terminated)
    del store  # only now: torchrun's static rendezvous shares its server
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    # torchrun's thread that keeps a rendezvous alive may be in C++ just now: an orderly end would abort this process.
    os._exit(1 if isinstance(code, str) else code)


def launch(options: Namespace, folder: Path, terminated: threading.Event) -> int | str:
    """Starts the ranks, again where they fail, and returns this process's exit code.

    Args:
        options: torchrun's. folder: for the statuses of ranks. terminated: set once SIGTERM has come.
    """
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

    from pipeline.training.parallel.contact import PEERS_READ_S
    from pipeline.training.parallel.membership import Membership

    without_tracebacks()
    config, command, arguments = run.config_from_args(options)
    parameters = RendezvousParameters(
        config.rdzv_backend, config.rdzv_endpoint, config.run_id, config.min_nodes, config.max_nodes, config.local_addr,
        **config.rdzv_configs,
    )  # fmt: skip
    where = f"{config.rdzv_endpoint}, where the nodes meet"
    membership = None
    try:
        membership = Membership(parameters, folder, terminated)
        limit = parameters.get_as_int("read_timeout", 60) or 60
        watching = threading.Thread(target=watch_ranks, args=(folder, membership, limit, where), daemon=True)
        watching.start()
        record(run_agent)(config, command, arguments, membership)
    except SignalException as error:
        return after_signal(error.sigval.name, read_rank_statuses(folder))
    except Preempted:
        return PREEMPTED
    except ChildFailedError as error:
        if membership and membership.preempted():
            return PREEMPTED
        return after_failure(error.failures, read_rank_statuses(folder))
    except RendezvousClosedError:
        if membership and membership.elastic:
            print("note: the job has ended on the other nodes: nothing is left to do here", file=sys.stderr)
            return 0
        return f"error: another node has ended the job: its log says why ({where})"
    except RendezvousTimeoutError:
        return f"error: {where}: too few nodes came in time (--rdzv-conf=join_timeout=SECONDS)"
    except (RendezvousError, DistError) as error:
        asked = terminated.is_set() or (
            membership is not None and membership.contact is not None and membership.contact.ended
        )
        return lost(where, one_line(error.__cause__ or error).split(". ")[0], asked, folder)
    finally:
        if membership and membership.contact:
            if terminated.is_set() or membership.elastic:
                time.sleep(PEERS_READ_S)  # this may hold the store: others read there why it ends, or that all is done
            membership.contact.stop()
    return 0


def run_agent(config: Any, command: Any, arguments: list[str], membership: "Membership") -> None:
    """As torch.distributed.launcher.launch_agent, over this rendezvous. Raises ChildFailedError."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from pipeline.torch_compat import JudgedAgent

    spec = WorkerSpec(
        role=config.role, local_world_size=config.nproc_per_node, entrypoint=command, args=tuple(arguments),
        rdzv_handler=membership, max_restarts=config.max_restarts, monitor_interval=config.monitor_interval,
        local_addr=config.local_addr, event_log_handler=config.event_log_handler, numa_options=config.numa_options,
        duplicate_stdout_filters=config.duplicate_stdout_filters,
        duplicate_stderr_filters=config.duplicate_stderr_filters, virtual_local_rank=config.virtual_local_rank,
    )  # fmt: skip
    agent = JudgedAgent(
        membership.judge, spec=spec, logs_specs=config.logs_specs, start_method=config.start_method,
        exit_barrier_timeout=END_BARRIER_S, log_line_prefix_template=config.log_line_prefix_template,
        shutdown_timeout=config.shutdown_timeout,
    )  # fmt: skip
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    result = agent.run()
    failed = result is not None and result.is_failed()
    if not (failed and membership.elastic):  # there the other nodes go on
        membership.shutdown()
    if failed:
        raise ChildFailedError(str(command), result.failures)


def without_tracebacks() -> None:
    """Leaves of torchrun's log of a lost connection one line."""

    def shorten(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = f"{record.getMessage()}: {one_line(record.exc_info[1])}", ()
            record.exc_info = None
        return True

    logging.getLogger("torch.distributed.elastic.agent.server.api").addFilter(shorten)


def end_while_waiting(folder: Path, alone: bool) -> threading.Event:
    """Lets SIGTERM end this process in a wait for other nodes too: that is in C, where Python runs no handler of signals.

    Once torchrun handles the signal, nothing happens here, but that the event is set.

    Args:
        folder: to remove then. alone: there are no other nodes, which would have to read that this one ends.
    Returns: set once the signal has come.
    """
    terminated = threading.Event()
    handler = signal.getsignal(signal.SIGTERM)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def wait() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGTERM:
                terminated.set()
                if signal.getsignal(signal.SIGTERM) is handler:
                    time.sleep(0 if alone else LAST_WORDS_S)
                    shutil.rmtree(folder, ignore_errors=True)
                    os._exit(PREEMPTED)

    threading.Thread(target=wait, daemon=True, name="preemption").start()
    return terminated


def watch_ranks(folder: Path, membership: "Membership", limit: float, where: str) -> None:
    """Kills ranks of this machine that have stopped beating: torchrun then restarts them, or ends.

    And ends this process where the host of the store is cut off, since torchrun may wait for it for a quarter of an hour.

    Args:
        limit: seconds without an answer of the store. where: it is.
    """
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
        if membership.contact and (silence := membership.contact.silence()) > limit:
            end_ranks(float(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]))
            asked = membership.terminated.is_set() or membership.contact.ended
            code = lost(where, f"no answer for {silence:.0f} s", asked, folder)
            if isinstance(code, str):
                print(code, file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1 if isinstance(code, str) else code)


def end_ranks(timeout: float) -> None:
    """Sends SIGTERM to all ranks of this machine, and SIGKILL to those that are still there after `timeout` seconds."""
    end = time.monotonic() + timeout
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in children():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while children() and time.monotonic() < end:
            time.sleep(0.2)


def lost(where: str, how: str, asked: bool, folder: Path) -> int | str:
    """The exit code after contact with the other nodes is lost: of preemption, if all ranks have saved their work.

    Args:
        where: the nodes meet. how: contact was lost. asked: some node has received SIGTERM; a lost rank has no more to save.
    """
    states = {status.state for status in read_rank_statuses(folder)}
    if (states or asked) and states <= ({"preempted", "holding", "lost"} if asked else {"preempted", "holding"}):
        return PREEMPTED
    return f"error: lost contact with {where} ({how}): it is gone, or the network. The newest checkpoint is kept."


def after_signal(name: str, statuses: list[RankStatus]) -> int | str:
    """The exit code after torchrun was ended by a signal. A rank without a status had nothing to lose.

    Args:
        name: of the signal. statuses: of the last attempt.
    """
    states = [status.state for status in statuses]
    if {"started", "failed"} & set(states):
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
