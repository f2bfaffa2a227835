"""What the ranks of an evaluation do together; one process without a process group is one rank."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from features.batch import Batch
from features.errors import OtherRankError, UserError

Found = TypeVar("Found")

WAIT = timedelta(hours=2)  # that a rank may wait for another one, which reads a checkpoint or writes a report
ENDED, READ, FAILED = range(3)  # of a rank's next batch, the worst last


def rank_of() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(act: Callable[[], Found]) -> list[Found]:
    """What `act` returns on each rank, on all of them. Every rank calls it.

    Raises:
        UserError: the first one that a rank has raised, on every rank; an OSError as one.
    """
    outcome: Any = None
    try:
        outcome = act()
    except UserError as error:
        outcome = error
    except OSError as error:
        outcome = UserError(f"{error.filename}: cannot be read: {error.strerror}")
    outcomes = [outcome]
    if dist.is_initialized() and dist.get_world_size() > 1:
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=cpu_group())
    if failed := next((found for found in outcomes if isinstance(found, UserError)), None):
        raise failed
    return outcomes


def to_first(value: Found) -> list[Found] | None:
    """Each rank's value, on rank 0; None on the others. Every rank calls it. Values pass through main memory."""
    rank, ranks = rank_of()
    if ranks == 1:
        return [value]
    values: list[Any] | None = [None] * ranks if rank == 0 else None
    dist.gather_object(value, values, group=cpu_group())
    return values


def cpu_group() -> dist.ProcessGroup | None:
    """All ranks, whose messages pass through main memory; None: those of the default group do.

    NCCL would send them through the GPU: they would take its memory, and a rank that waits for another would keep it busy,
    beside a training perhaps. All ranks call it.
    """
    return None if dist.get_backend() == "gloo" else _cpu_group(dist.group.WORLD)


@cache
def _cpu_group(every: dist.ProcessGroup) -> dist.ProcessGroup:  # noqa: ARG001
    """One group a process, however many checkpoints it evaluates."""
    return dist.new_group(backend="gloo", timeout=WAIT)


def batches_in_step(batches: Iterator[Batch], empty: Callable[[], Batch]) -> Iterator[Batch]:
    """A rank's batches, then batches of padding until the last rank has none left: a sharded forward needs all ranks.

    It takes one small all-reduce a batch, which does not wait for a GPU.

    Args:
        batches: of this rank, of any number. empty: makes one of padding alone, which counts in nothing.
    Raises:
        UserError: on every rank, where one cannot read its next batch.
    """
    if rank_of()[1] == 1:
        yield from batches
        return
    state = torch.zeros((), dtype=torch.int32)
    while True:
        batch, failed = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            failed = error
        state.fill_(FAILED if failed else ENDED if batch is None else READ)
        dist.all_reduce(state, dist.ReduceOp.MAX, group=cpu_group())
        if failed:
            raise failed
        if (worst := int(state.item())) == FAILED:
            raise OtherRankError("another rank cannot read its rows: its own error says why")
        if worst == ENDED:
            return
        yield empty() if batch is None else batch
