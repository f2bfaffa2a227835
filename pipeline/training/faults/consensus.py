"""What ranks have to agree on before one of them acts: that a run shall end, and that a batch cannot be learnt from."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_NEVER = torch.iinfo(torch.int64).max


class Verdict(NamedTuple):
    """What the ranks together know.

    Attributes:
        stop: some rank was told to end.
        bad: the first step whose loss is not finite on some rank.
    """

    stop: bool = False
    bad: int | None = None


class Agreement:
    """A message of each rank with every step, which all read one step later: so nobody waits for it.

    Args:
        group: of all ranks on the CPU, used by nothing else; None for a rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.sent: tuple[dist.Work, Tensor] | None = None

    def exchange(self, stop: bool, bad: int | None) -> Verdict:
        """Tells the others, and returns what all have told a step ago; a rank alone knows at once."""
        if self.group is None:
            return Verdict(stop, bad)
        before = self.settle()
        told = torch.tensor([not stop, _NEVER if bad is None else bad])
        self.sent = dist.all_reduce(told, dist.ReduceOp.MIN, group=self.group, async_op=True), told
        return before

    def settle(self) -> Verdict:
        """Waits for what was told last; nothing new if that is known already."""
        if self.sent is None:
            return Verdict()
        work, told = self.sent
        self.sent = None
        work.wait()
        going, bad = told.tolist()
        return Verdict(not going, None if bad == _NEVER else bad)
