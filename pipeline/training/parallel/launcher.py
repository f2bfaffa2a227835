"""A launcher: torchrun's agent over our own membership of nodes, and what watches it and its ranks."""

import logging
import os
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from features.errors import Preempted, one_line
from pipeline.processes import children
from pipeline.torch_compat import JudgedAgent
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import read_rank_statuses, silent_ranks
from pipeline.training.parallel.contact import PEERS_READ_S
from pipeline.training.parallel.exit_codes import after_failure, after_signal, lost
from pipeline.training.parallel.membership import Membership

LAST_WORDS_S = 3  # that other nodes have to read that this one ends
END_BARRIER_S = 60  # that a node which is done waits for the others, before it closes the store


def launch(options: Namespace, folder: Path, terminated: threading.Event) -> int | str:
    """Starts the ranks, again where they fail, and returns this process's exit code.

    Args:
        options: torchrun's. folder: for the statuses of ranks. terminated: set once SIGTERM has come.
    """
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
        asked = terminated.is_set() or bool(membership and membership.contact and membership.contact.ended_by)
        return lost(where, one_line(error.__cause__ or error).split(". ")[0], asked, folder)
    finally:
        if membership and membership.contact:
            if terminated.is_set() or membership.elastic:
                time.sleep(PEERS_READ_S)  # this may hold the store: others read there why it ends, or that all is done
            membership.contact.stop()
    return 0


def run_agent(config: Any, command: Any, arguments: list[str], membership: Membership) -> None:
    """As torch.distributed.launcher.launch_agent, over this rendezvous. Raises ChildFailedError."""
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


def watch_ranks(folder: Path, membership: Membership, limit: float, where: str) -> None:
    """Kills ranks of this machine that have stopped beating: torchrun then restarts them, or ends.

    And ends this process where the host of the store is cut off, since torchrun may wait for it for a quarter of an hour.

    Args:
        limit: seconds without an answer of the store. where: it is.
    """
    warned = False
    while True:
        time.sleep(1)
        if membership.elastic and membership.contact and not warned:
            warned = warn_of_clock(membership.contact.ahead, membership.patience, where)
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
            asked = membership.terminated.is_set() or bool(membership.contact.ended_by)
            code = lost(where, f"no answer for {silence:.0f} s", asked, folder)
            if isinstance(code, str):
                print(code, file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1 if isinstance(code, str) else code)


def warn_of_clock(ahead: float, patience: float, where: str) -> bool:
    """Prints a line where clocks differ so much that nodes take each other for lost; whether they do.

    Args:
        ahead: seconds that this machine's clock is. patience: without a sign of life. where: the nodes meet.
    """
    if abs(ahead) < patience / 2:
        return False
    print(
        f"warning: the clock here is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {where}: from "
        f"{patience:.0f} s on they take each other for lost, and do not train together. Synchronise them.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return True


def end_ranks(timeout: float) -> None:
    """Sends SIGTERM to all ranks of this machine, and SIGKILL to those that are still there after `timeout` seconds."""
    end = time.monotonic() + timeout
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in children():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while children() and time.monotonic() < end:
            time.sleep(0.2)
