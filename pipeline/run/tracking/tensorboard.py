"""TensorBoard: RUN/tensorboard has the curves of training, a folder below it those of each split.

TensorBoard's files are written to a folder of this machine; of a run on a store they are put there from it.
"""

import tempfile
import uuid
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.tracking import scalars
from pipeline.run.tracking.base import (
    TRAIN,
    EvalRecord,
    Event,
    Job,
    Record,
    Recorded,
    RolledBack,
    Sink,
    State,
    TrainRecord,
)
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.storage.files import make_folder, storage_of
from pipeline.storage.store_path import on_store

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def open_sink(job: Job, _: TrackingSettings) -> Sink:
    """The sink of a training, or of the evaluation of a split. Raises UserError where a folder is a link."""
    return TrainingCurves(job) if job.series == TRAIN else EvaluationCurves(job)


def open_writer(folder: Path, **options: Any) -> "SummaryWriter":
    """A writer of curves, imported only here: all ranks import this module, and one of them draws."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), **options)


class TrainingCurves:
    """Curves of a training. TensorBoard hides the steps that a resumed or rolled back run repeats."""

    def __init__(self, job: Job) -> None:
        self.run, self.folder = job.run, make_folder(job.run.tensorboard)
        self.local = _Local(self.folder)
        self.writer = open_writer(self.local.path, purge_step=job.step + 1)

    def handle(self, event: Event) -> None:
        """Draws a record, or begins again after a rollback."""
        match event:
            case TrainRecord(record):
                for name, value in scalars.of_training(record).items():
                    self.writer.add_scalar(name, value, record["step"])
            case RolledBack(step):
                with suppress(OSError):  # of a full disk: the new file may have room
                    self.writer.close()
                self.writer = open_writer(self.local.path, purge_step=step + 1)
        if self.run.outbox:
            for file in self.local.files():
                self.run.outbox.put(self.folder / file.name, partial(self._content, file))

    def close(self, _: State) -> None:
        """Flushes."""
        self.writer.close()
        for file in self.local.files():
            if self.run.outbox:
                self.run.outbox.put(self.folder / file.name, partial(bytes, file.read_bytes()))
            else:
                self.local.send(file)
        self.local.remove()

    def _content(self, file: Path) -> bytes:
        self.writer.flush()
        return file.read_bytes()


class EvaluationCurves:
    """Curves of a split, of the latest record of each step, in one file.

    Evaluators that work at the same time share the folder: whoever finds another's file there, or has a record of an earlier
    step than the last, writes all records anew and deletes the other files. So neither a kill between a record and its curve,
    nor a second evaluation of a step, nor a second evaluator leaves a gap or a point too many.
    """

    def __init__(self, job: Job) -> None:
        make_folder(job.run.tensorboard)
        self.run, self.folder = job.run, make_folder(job.run.tensorboard / job.series)
        self.local = _Local(self.folder)
        self.records: dict[int, Record] = {}
        self.writer: SummaryWriter | None = None
        self._draw(job.history)

    def handle(self, event: Event) -> None:
        """Draws what is new."""
        match event:
            case EvalRecord(record) if self.records.get(record["step"]) != record:
                self._draw([record])
            case Recorded(read):
                # Otherwise a slower evaluator could write what it has read before over what another has written since.
                with self.run.wait_for_lock("tensorboard"):
                    self._draw(read())

    def close(self, _: State) -> None:
        """Flushes."""
        if self.writer:
            self.writer.close()
        self.local.remove()

    def _draw(self, records: Iterable[Record]) -> None:
        fresh = {record["step"]: record for record in records if self.records.get(record["step"]) != record}
        is_later = min(fresh, default=0) > max(self.records, default=-1)
        known = self.records | fresh
        if self.writer is None or self._others() or (fresh and not is_later):
            with suppress(OSError):  # of a full disk: the new file may have room
                if self.writer:
                    self.writer.close()
            # The suffix makes the file's name this sink's own. A TensorBoard that has read other files drops their points.
            self.suffix = f".{uuid.uuid4().hex}"
            self.writer = open_writer(self.local.path, purge_step=0, filename_suffix=self.suffix)
            fresh = known
        for step in sorted(fresh):
            for name, value in scalars.of_evaluation(fresh[step]).items():
                self.writer.add_scalar(name, value, step)
        self.writer.flush()
        for file in self.local.files():
            if file.name.endswith(self.suffix):
                self.local.send(file)
        self.records = known
        for file in self._others():
            file.unlink(missing_ok=True)

    def _others(self) -> list[Path]:
        return [file for file in self.folder.glob("events.out.tfevents.*") if not file.name.endswith(self.suffix)]


class _Local:
    """The folder of this machine for what belongs into a folder: that itself, or of one on a store a temporary one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = tempfile.TemporaryDirectory(prefix="tensorboard-") if on_store(folder) else None
        self.path = Path(self.temporary.name) if self.temporary else folder

    def files(self) -> list[Path]:
        """Those that have to be put on a store."""
        return sorted(self.path.iterdir()) if self.temporary else []

    def send(self, file: Path) -> None:
        """Puts one of them there."""
        storage_of(self.folder).write(self.folder / file.name, file.read_bytes())

    def remove(self) -> None:
        """Deletes a temporary folder."""
        if self.temporary:
            self.temporary.cleanup()
