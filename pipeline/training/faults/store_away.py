"""A dataset on a store that stays away: the ranks end together after the same step, with a checkpoint."""

import errno
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from features.batch import Batch
from features.errors import UserError, one_line

if TYPE_CHECKING:
    from pipeline.training.trainer import Trainer


def why_away(error: BaseException) -> str | None:
    """In one line that a store has not answered for too long, where an error or what it was raised from says so; else None."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno == errno.ETIMEDOUT:
            return f"{found.filename}: {found.strerror}" if found.filename and found.strerror else one_line(found)
        found = found.__cause__ or found.__context__
    return None


class DataAway:
    """Whether every rank has got its next batch.

    Args:
        group: a CPU process group of all ranks that nothing else uses; None where they need not ask: a single rank, or data
            on a mounted file system.
    Attributes:
        why: what a store has not answered, once one has not.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group, self.why = group, ""

    def next_of(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None at the end, and on all ranks where a store stays away from one. Every rank calls it.

        Raises: whatever else the iterator does.
        """
        batch = None
        try:
            batch = next(batches, None)
        except (OSError, UserError) as error:
            if (why := why_away(error)) is None:
                raise
            self.why = why
        return None if self._on_any_rank() else batch

    def _on_any_rank(self) -> bool:
        if self.group is None:
            return bool(self.why)
        there = torch.tensor(not self.why, dtype=torch.int64)
        dist.all_reduce(there, dist.ReduceOp.MIN, group=self.group)
        if not there and not self.why:
            self.why = "the store of the dataset has not answered another rank"
        return not there


def leave(trainer: "Trainer") -> None:
    """Ends a run whose data cannot be read for now, after a checkpoint of the last step that all ranks have taken.

    Raises:
        Preempted: the same command goes on from there. UserError: the checkpoint cannot be written either.
    """
    check = partial(trainer.nonfinite.check, trainer.state.position.epoch)
    verdict = trainer.consensus.agree(True, False, check, read=True, save=True)
    if verdict.bad_step is not None:
        trainer.away.why = ""
        trainer.rollback(verdict.bad_step)
        return
    if trainer.state.saved != trainer.state.step:
        trainer.save()
    trainer.stop(trainer.away.why)
