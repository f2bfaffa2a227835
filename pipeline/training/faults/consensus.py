"""Agreement between ranks before one of them acts: that the run stops or makes room, and that a step is rolled back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_NO_STEP = torch.iinfo(torch.int64).max


class Verdict(NamedTuple):
    """What the ranks know together.

    Attributes:
        stop: some rank was preempted.
        bad_step: the first step whose loss or gradient is not finite on some rank.
        joining: nodes wait to join.
    """

    stop: bool = False
    bad_step: int | None = None
    joining: bool = False

    def with_later(self, later: "Verdict") -> "Verdict":
        """This, and what a later message adds before the step is saved; whether to stop stays as it was."""
        return Verdict(self.stop, later.bad_step or self.bad_step, later.joining or self.joining)


class Consensus:
    """A message of each rank with every step, which all ranks read one step later: nobody waits for it.

    Args:
        group: a CPU process group of all ranks that nothing else uses meanwhile; None for a single rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.pending: tuple[dist.Work, Tensor] | None = None

    def share(self, stop: bool, bad_step: int | None, joining: bool = False) -> Verdict:
        """Sends this rank's message, and returns the verdict of the step before; a single rank knows at once."""
        if self.group is None:
            return Verdict(stop, bad_step, joining)
        earlier = self.collect()
        message = torch.tensor([not stop, _NO_STEP if bad_step is None else bad_step, not joining])
        self.pending = dist.all_reduce(message, dist.ReduceOp.MIN, group=self.group, async_op=True), message
        return earlier

    def collect(self) -> Verdict:
        """Waits for the messages sent last; an empty verdict if they were read already."""
        if self.pending is None:
            return Verdict()
        work, message = self.pending
        self.pending = None
        work.wait()
        going, bad_step, alone = message.tolist()
        return Verdict(not going, None if bad_step == _NO_STEP else bad_step, not alone)

    def agree(
        self, stop: bool, joining: bool, bad_step: Callable[[bool], int | None], read: bool, save: bool
    ) -> Verdict:
        """What is done after a step, the same on all ranks.

        Args:
            bad_step: the first one that this rank knows of; with True it waits for its device, to know of all until now.
            read: this step waits for the device. save: this step is saved, whose messages are waited for.
        """
        verdict = self.share(stop, bad_step(read), joining)
        if save or verdict.stop:
            verdict = verdict.with_later(self.collect())
        if verdict.bad_step is not None or (verdict.stop and not read):
            # A rank may have read less than others: of a step before the one that they found, or of those that are saved now.
            verdict = Verdict(verdict.stop, self._first(bad_step(True)), verdict.joining)
        return verdict

    def _first(self, bad_step: int | None) -> int | None:
        if self.group is None:
            return bad_step
        self.collect()
        first = torch.tensor(_NO_STEP if bad_step is None else bad_step)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self.group)
        return None if first == _NO_STEP else int(first)
