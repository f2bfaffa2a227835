"""What a launcher exits with: 75 where nothing is lost, 0 where all is done, else a line that says why."""

import signal
from collections.abc import Iterable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import RankStatus, read_rank_statuses


def lost(where: str, how: str, asked: bool, folder: Path) -> int | str:
    """The exit code after contact with the other nodes is lost: of preemption, if all ranks have saved their work.

    Args:
        where: the nodes meet. how: contact was lost. asked: some node has received SIGTERM; a lost rank has no more to save.
    """
    states = {status.state for status in read_rank_statuses(folder)}
    if (states or asked) and states <= ({"preempted", "holding", "lost"} if asked else {"preempted", "holding"}):
        return PREEMPTED
    return (
        f"error: lost contact with {where} ({how}): the network, that node or its launcher has ended; its log may say why. "
        "The newest checkpoint is kept."
    )


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


def after_failure(failures: dict[int, ProcessFailure], statuses: Iterable[RankStatus]) -> int | str:
    """The exit code after ranks have exited with another code than 0; those that failed have printed their error.

    Args:
        failures: by rank. statuses: of the last attempt.
    """
    states = {status.pid: status.state for status in statuses}

    def lost_nothing(failure: ProcessFailure) -> bool:
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
