"""Status and heartbeat of a rank, for the launcher of its machine (see jobs.launch)."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.storage.files import write_json

STATUS_FOLDER = "TASKFUSE_RANK_STATUS"  # environment variable: where each rank of a machine writes

ROUND = "TASKFUSE_ROUND"  # environment variable: which start of ranks this is, the same number on all nodes
REASON = "TASKFUSE_RESTART_REASON"  # environment variable: why ranks were started again; empty for the first ones
NODES_WAITING = "nodes.waiting"  # a file that the launcher keeps there as long as nodes wait to join

State = Literal["started", "preempted", "finished", "holding", "lost", "failed"]


class RankStatus(NamedTuple):
    """A rank's status.

    Attributes:
        state: holding is at a committed checkpoint, until the launcher ends the rank; lost has no contact with other ranks.
        attempt: counts torchrun's restarts. ranks: of this machine. reason: why it failed, one line.
    """

    state: State
    attempt: int
    pid: int
    ranks: int
    reason: str = ""


class Alive(NamedTuple):
    """A rank's heartbeat.

    Attributes:
        timeout: seconds without one after which the launcher may take it for hung. taken: steps since this process began.
    """

    pid: int
    timeout: float
    step: int
    taken: int


def write_rank_status(state: State, reason: str = "") -> None:
    """Tells jobs.launch, if it started this process, how far the rank has come."""
    if not (folder := os.environ.get(STATUS_FOLDER)):
        return
    if state in ("preempted", "finished") and _in_main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would change the exit code
    if state in ("failed", "lost") and _in_main_thread():
        # A handler would call the launcher's SIGTERM preemption, or raise while Python ends.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    env = os.environ
    if state == "started":
        end_heartbeat()  # of an earlier attempt
    attempt, ranks = int(env["TORCHELASTIC_RESTART_COUNT"]), int(env["LOCAL_WORLD_SIZE"])
    status = RankStatus(state, attempt, os.getpid(), ranks, reason[:1000])
    with suppress(OSError):  # a full disk: the exit code says the same, if less surely
        write_json(Path(folder) / env["LOCAL_RANK"], status)


def write_heartbeat(step: int, timeout: float, taken: int) -> None:
    """Tells jobs.launch, if it started this process, that the rank is alive."""
    if folder := os.environ.get(STATUS_FOLDER):
        with suppress(OSError):  # a full disk must not end training
            alive = Alive(os.getpid(), timeout, step, taken)
            Path(folder, f"{os.environ['LOCAL_RANK']}.alive").write_text(json.dumps(alive))


def end_heartbeat() -> None:
    """Tells jobs.launch that no more heartbeats come, as at the end of training."""
    if folder := os.environ.get(STATUS_FOLDER):
        with suppress(OSError):  # gone with the launcher's folder
            Path(folder, f"{os.environ['LOCAL_RANK']}.alive").unlink(missing_ok=True)


def nodes() -> int:
    """How many nodes train together, of those that torchrun knows."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def restart_reason() -> str:
    """Why the launcher has started this process again, one line; empty where it has not."""
    return os.environ.get(REASON, "")


def nodes_wait() -> bool:
    """Whether the launcher of this process, if it is jobs.launch, knows of nodes that wait to join."""
    return (folder := os.environ.get(STATUS_FOLDER)) is not None and Path(folder, NODES_WAITING).exists()


def forget_rank_statuses(folder: Path) -> None:
    """Removes what ranks that are gone have written, before others are started."""
    for path in folder.iterdir():
        if not path.is_dir():  # torchrun's logs
            path.unlink(missing_ok=True)


def read_rank_statuses(folder: Path) -> list[RankStatus]:
    """The last status of each rank that has begun the last attempt that any has begun."""
    found = [RankStatus(*json.loads(path.read_text())) for path in folder.iterdir() if not path.suffix]
    last = max((status.attempt for status in found), default=0)
    return [status for status in found if status.attempt == last]


def silent_ranks(folder: Path) -> list[tuple[Alive, float]]:
    """The ranks whose last heartbeat is older than their timeout, with its age in seconds; each is returned once."""
    found = []
    for path, alive in _heartbeats(folder):
        with suppress(OSError):  # gone
            if (age := time.time() - path.stat().st_mtime) > alive.timeout:
                path.unlink()
                found.append((alive, age))
    return found


def steps_taken(folder: Path) -> int:
    """How many steps the ranks of this machine have taken since they were started, as far as they say."""
    return max((alive.taken for _, alive in _heartbeats(folder)), default=0)


def _heartbeats(folder: Path) -> Iterator[tuple[Path, Alive]]:
    for path in folder.glob("*.alive"):
        with suppress(OSError, ValueError):  # being written, or gone
            yield path, Alive(*json.loads(path.read_text()))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
