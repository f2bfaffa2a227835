"""TensorBoard: RUN/tensorboard has the curves of training, a folder below it those of each split."""

from contextlib import suppress

from torch.utils.tensorboard import SummaryWriter

from pipeline.run.tracking import scalars
from pipeline.run.tracking.base import TRAIN, EvalRecord, Event, Job, Record, RolledBack, Sink, State, TrainRecord
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.storage.files import make_folder


def open_sink(job: Job, _: TrackingSettings) -> Sink:
    """The sink of a training, or of the evaluation of a split. Raises UserError where a folder is a link."""
    return TrainingCurves(job) if job.series == TRAIN else EvaluationCurves(job)


class TrainingCurves:
    """Curves of a training. TensorBoard hides the steps that a resumed or rolled back run repeats."""

    def __init__(self, job: Job) -> None:
        self.folder = make_folder(job.run.tensorboard)
        self.writer = SummaryWriter(str(self.folder), purge_step=job.step + 1)

    def handle(self, event: Event) -> None:
        """Draws a record, or begins again after a rollback."""
        match event:
            case TrainRecord(record):
                for name, value in scalars.of_training(record).items():
                    self.writer.add_scalar(name, value, record["step"])
            case RolledBack(step):
                with suppress(OSError):  # of a full disk: the new file may have room
                    self.writer.close()
                self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def close(self, _: State) -> None:
        """Flushes."""
        self.writer.close()


class EvaluationCurves:
    """Curves of a split, of the latest record of each step.

    A new evaluator writes them whole from eval.jsonl and deletes the files of the one before it, so that neither a kill between
    a record and its curve nor a second evaluation of a step leaves a gap or a point too many.
    """

    def __init__(self, job: Job) -> None:
        make_folder(job.run.tensorboard)
        self.folder = make_folder(job.run.tensorboard / job.series)
        for file in self.folder.glob("events.out.tfevents.*"):
            file.unlink()
        self.records = {record["step"]: record for record in job.history}
        self._begin(0)

    def handle(self, event: Event) -> None:
        """Draws a record; one of an earlier step takes the place of what was drawn from there on."""
        if not isinstance(event, EvalRecord):
            return
        step = event.record["step"]
        is_newest = step > max(self.records, default=-1)
        self.records[step] = event.record
        if is_newest:
            self._draw(event.record)
            self.writer.flush()
        else:
            with suppress(OSError):  # of a full disk: the new file may have room
                self.writer.close()
            self._begin(step)

    def close(self, _: State) -> None:
        """Flushes."""
        self.writer.close()

    def _begin(self, step: int) -> None:
        """A new file with the records from `step` on, which hides what others have of these."""
        self.writer = SummaryWriter(str(self.folder), purge_step=step)
        for known in sorted(self.records):
            if known >= step:
                self._draw(self.records[known])
        self.writer.flush()

    def _draw(self, record: Record) -> None:
        for name, value in scalars.of_evaluation(record).items():
            self.writer.add_scalar(name, value, record["step"])
