"""How ranks hear of one that has failed: from the store, where it writes that itself, or another rank of its machine does."""

import json
import os
import socket
from typing import NamedTuple

import torch.distributed as dist

from features.errors import OtherRankError, Preempted, UserError
from features.printable import printable

# One key for all ranks. Each asks for it once a second, with a heartbeat: of 512 ranks these are 1,000 requests of some 100
# bytes a second, of the 10,000s that a store of torch answers. A key for each rank would be 260,000.
FAILED = "failed"


class Failure(NamedTuple):
    """What the other ranks print as they end.

    Attributes:
        text: which rank, and why, one line. cause: False of a rank that has ended since it had lost another.
    """

    text: str
    cause: bool


def failure_of(rank: int, error: BaseException | None) -> Failure | None:
    """The failure of this process, by the exception that ends it; None where it is done, preempted, or ends with 0."""
    if error is None or isinstance(error, Preempted):
        return None
    if isinstance(error, SystemExit) and error.code in (None, 0, os.EX_TEMPFAIL):
        return None
    said = printable(" ".join(str(error).split()))[:1000]
    reason = said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
    lost = isinstance(error, OtherRankError)
    return Failure(f"rank {rank} on {socket.gethostname()} {'has ended' if lost else 'failed'}: {reason}", not lost)


def report(store: dist.Store, failure: Failure) -> None:
    """Writes a failure, unless another is there; a cause takes the place of one that is none."""
    known = store.compare_set(FAILED, "", json.dumps(failure))
    if failure.cause and not Failure(*json.loads(known)).cause:
        store.set(FAILED, json.dumps(failure))


def reported(store: dist.Store) -> Failure:
    """The failure that some rank has reported."""
    return Failure(*json.loads(store.get(FAILED)))


def leave(store: dist.Store, rank: int) -> None:
    """Writes that this rank has nothing more to report: its process ends."""
    store.set(f"left/{rank}", "")


def report_gone(store: dist.Store, rank: int, pid: int) -> None:
    """Reports another rank of this machine whose process is gone, unless it has left."""
    if not store.check([f"left/{rank}"]):
        what = f"its process, pid {pid}, is gone: killed, as by the kernel where memory runs out, or crashed"
        report(store, Failure(f"rank {rank} on {socket.gethostname()} failed: {what}", True))
