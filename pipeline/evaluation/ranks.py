"""What the ranks of one evaluator agree on: rank 0 chooses the checkpoint, locks and records; all of them score it.

Without a process group there is one rank.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from features.errors import UserError
from pipeline.evaluation.lockstep import cpu_group

Answer = TypeVar("Answer")


def is_first() -> bool:
    """Whether this rank chooses and records."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(act: Callable[[], Answer]) -> Answer:
    """What `act` returns on rank 0, on every rank; the others do not call it.

    Raises:
        UserError: on every rank, where it is raised on rank 0.
    """
    if not dist.is_initialized():
        return act()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [act(), None]
        except (UserError, OSError) as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome, group=cpu_group())
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def first_error(error: Exception | None) -> Exception | None:
    """The error of the lowest rank that has one, as UserError unless it is this rank's own; all ranks call it."""
    if not dist.is_initialized():
        return error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error), group=cpu_group())
    found = next((message for message in messages if message is not None), None)
    return error or (None if found is None else UserError(found))
