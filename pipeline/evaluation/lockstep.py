"""What the ranks of an evaluation do together; one process without a process group is one rank."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from features.batch import Batch
from features.errors import OtherRankError, UserError

Found = TypeVar("Found")

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
        dist.all_gather_object(outcomes, outcome)
    if failed := next((found for found in outcomes if isinstance(found, UserError)), None):
        raise failed
    return outcomes


def to_first(value: Found) -> list[Found] | None:
    """Each rank's value, on rank 0; None on the others. Every rank calls it. Values pass through main memory."""
    rank, ranks = rank_of()
    if ranks == 1:
        return [value]
    values: list[Any] | None = [None] * ranks if rank == 0 else None
    group = None if dist.get_backend() == "gloo" else _cpu_group(dist.group.WORLD)
    dist.gather_object(value, values, group=group)
    return values


@cache
def _cpu_group(every: dist.ProcessGroup) -> dist.ProcessGroup:  # noqa: ARG001
    """The ranks of the default group, through main memory: one group a process, however many checkpoints it evaluates."""
    return dist.new_group(backend="gloo")


def batches_in_step(
    batches: Iterator[Batch], empty: Callable[[], Batch], device: torch.device | None = None
) -> Iterator[Batch]:
    """A rank's batches, then batches of padding until the last rank has none left: a sharded forward needs all ranks.

    It takes one small all-reduce a batch.

    Args:
        batches: of this rank, of any number. empty: makes one of padding alone, which counts in nothing.
        device: of collectives, the process group's; None: the CPU.
    Raises:
        UserError: on every rank, where one cannot read its next batch.
    """
    if rank_of()[1] == 1:
        yield from batches
        return
    state = torch.zeros((), dtype=torch.int32, device=device)
    while True:
        batch, failed = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            failed = error
        dist.all_reduce(state.fill_(FAILED if failed else ENDED if batch is None else READ), dist.ReduceOp.MAX)
        if failed:
            raise failed
        if (worst := int(state.item())) == FAILED:
            raise OtherRankError("another rank cannot read its rows: its own error says why")
        if worst == ENDED:
            return
        yield empty() if batch is None else batch
