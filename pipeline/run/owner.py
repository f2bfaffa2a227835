"""The one trainer that writes a run: its lock, and on a store what puts its lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from features.errors import UserError
from pipeline.run import retention
from pipeline.run.outbox import Outbox
from pipeline.run.run import LostRunError, Run
from pipeline.run.tracking.base import Committed
from pipeline.run.tracking.registry import Sinks
from pipeline.storage.base import Lock
from pipeline.storage.store_path import on_store


class Owner:
    """A run that this process trains, as its rank 0.

    Args:
        keep: which checkpoints are kept. dataset: its name. sinks: which hear of checkpoints.
    """

    def __init__(self, run: Run, keep: retention.Keep, dataset: str, sinks: Sinks) -> None:
        self.run, self.keep, self.dataset, self.sinks = run, keep, dataset, sinks
        self.lock: Lock | None = None
        self.is_lost = False

    def take(self) -> None:
        """Locks the run. Raises UserError where another trainer has it."""
        self.lock = self.run.lock("train", "another trainer writes to it")

    def close(self) -> None:
        """Unlocks the run. What has met a store's error may be referred to for long: that it is dropped is not enough."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def lost(self) -> bool:
        """Whether another trainer has taken the run over, as it may where this one's lease was not renewed in time.

        The store may be asked: not for the thread that trains.
        """
        self.is_lost = self.is_lost or (self.lock is not None and self.lock.lost)
        return self.is_lost

    def check(self, ask: bool = False) -> None:
        """Raises LostRunError where the run is known to be lost; `ask`: where it is, see `lost`."""
        if self.lost() if ask else self.is_lost:
            raise LostRunError(
                f"{self.run.path}: another trainer has taken the run over, since this one did not renew its lease in time. "
                "This one ends, and writes nothing more."
            )

    def before_commit(self) -> None:
        """Called before a checkpoint is one: the lines of the steps before it come first. Raises LostRunError, OSError."""
        self.run.flush()
        self.check(ask=True)  # after the flush, which may have taken long

    def committed(self, step: int, seconds: float) -> None:
        """What follows a checkpoint that is on disk; called in the thread that wrote it."""
        self.run.saving_s = max(self.run.saving_s or 0, seconds)
        if self.lost():  # later checkpoints than this one are the other trainer's
            return
        retention.prune(self.run, self.keep, self.dataset, step)
        self.sinks.handle(Committed(step, time.time()))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it lines and heartbeats of a run on a store are put by a thread. Raises UserError where the last cannot be."""
        if not on_store(self.run.path):
            yield
            return
        self.run.outbox = Outbox(self.lost)
        try:
            yield
        finally:
            written, self.run.outbox = self.run.outbox.close(), None
        if not written:
            raise UserError(
                f"{self.run.path}: the last lines of its metrics cannot be written. Rerun the same command later."
            )
