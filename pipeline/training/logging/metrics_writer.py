"""Metrics of a run in training: train.jsonl, progressive.jsonl, tracking, and progress on the terminal."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from tqdm import tqdm

from features.errors import UserError
from features.plain_json import validated
from pipeline.dataset.card.page import page_of
from pipeline.dataset.dataset import Dataset
from pipeline.run.run import Run
from pipeline.run.tracking import registry as tracking
from pipeline.run.tracking.base import TRAIN, Job, Published, RolledBack, TrainRecord
from pipeline.run.tracking.registry import Sinks
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.storage.files import read_lines
from pipeline.terminal import SECONDS, draws_bars, short_decimal
from pipeline.training.logging.learning_check import faults

logger = logging.getLogger(__name__)
HISTORY = 200  # records that the check of learning looks back


class _Record(BaseModel):
    """What a resumed run reads of the records before it."""

    step: int
    rows: int
    lr: float
    loss: float
    weight: dict[str, float]
    ne: dict[str, float | None]
    task_loss: dict[str, float | None]
    faults: list[Annotated[list[str], Field(min_length=3, max_length=3)]] = []


class MetricsWriter:
    """Writes metrics, and shows progress: a bar on a terminal, a log line every 10 s elsewhere.

    Args:
        run: where the files go. tasks: their names. step, steps: where the run starts and ends.
        sinks: which get the records too (pipeline.run.tracking); their owner closes them.
    """

    def __init__(self, run: Run, tasks: list[str], step: int, steps: int, sinks: Sinks) -> None:
        self.run, self.tasks, self.steps, self.sinks = run, tasks, steps, sinks
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if draws_bars() else None
        self.logged = 0.0
        self.unwritten: list[tuple[Path, dict[str, Any]]] = []
        earlier = [validated(_Record, record, run.train_metrics) for record in read_lines(run.train_metrics)]
        self.records: list[Mapping[str, Any]] = [record.model_dump() for record in earlier[-HISTORY:]]
        self.faults = {
            (task, cause): record.step for record in earlier for task, cause, _ in record.faults
        }  # and its step

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record: step, rows, left_out, epoch, lr, loss, weight, ne and task_loss (per task), rows_per_s, data_wait,
        seconds_left; and faults (task, cause, line), where the check of learning adds some.
        """
        self.records = [*self.records[1 - HISTORY :], record]
        if found := faults(self.records, self.faults):
            record["faults"] = [list(fault) for fault in found]
            self.faults |= {(fault.task, fault.cause): record["step"] for fault in found}
            for fault in found:
                logger.warning(fault.line)
        self._write(self.run.train_metrics, record)
        self.sinks.handle(TrainRecord(record))
        self.run.write_status("training", record["step"], self.steps)
        figures = _figures(record)
        rate = f"{record['rows_per_s']:,.0f} rows/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{rate}  {figures}  data wait {record['data_wait']:.1%}", refresh=False)
            self.bar.update(record["step"] - self.bar.n)
        elif time.monotonic() - self.logged > SECONDS or record["step"] == self.steps:
            self.logged = time.monotonic()
            minutes, seconds = divmod(int(record["seconds_left"]), 60)
            logger.info(
                f"step {record['step']:,}/{self.steps:,}  rows {_short(record['rows'])}  {rate}  {figures}  "
                f"data wait {record['data_wait']:.1%}  left {minutes}m {seconds:02d}s"
            )

    def roll_back(self, step: int) -> None:
        """Hides the curves of the steps after `step`, which are repeated."""
        self.records = [record for record in self.records if record["step"] <= step]
        self.faults = {fault: found for fault, found in self.faults.items() if found <= step}
        self.sinks.handle(RolledBack(step))

    def day(self, record: dict[str, Any]) -> None:
        """Writes a record of progressive.jsonl: epoch, day, step, rows, ne and task_loss of a day's or an epoch's batches."""
        self._write(self.run.progressive, record)
        if record["day"]:
            logger.info(f"day {record['day']}  {_figures(record)}  (each batch before it was trained on)")

    def _write(self, path: Path, record: dict[str, Any]) -> None:
        """Appends a line; on a full disk lines are kept in memory until there is room."""
        first = not self.unwritten
        self.unwritten.append((path, record))
        try:
            while self.unwritten:
                self.run.append(*self.unwritten[0])
                del self.unwritten[0]
        except OSError as error:
            if first:
                logger.warning(
                    f"{path}: cannot be written: {error.strerror}. Free space; its lines are kept in memory until then."
                )

    def close(self) -> None:
        """Ends the bar and names the run's faults. Raises UserError where lines could not be written."""
        if self.bar is not None:
            self.bar.close()
        if self.faults:
            names = ", ".join(f"{task} ({cause})" for task, cause in sorted(self.faults))
            logger.warning(f"not all was learnt: {names}. {self.run.train_metrics} has the lines, as faults.")
        if self.unwritten:
            raise UserError(
                f"{self.unwritten[0][0]}: {len(self.unwritten)} lines of metrics could not be written: free space"
            )


@contextmanager
def tracked(
    run: Run, settings: TrackingSettings, dataset: Dataset, step: int, steps: int, sinks: Sinks
) -> Iterator[MetricsWriter]:
    """The writer of a run that goes on from a step, and within it the sinks that the settings ask for. Raises UserError."""
    job = Job(run, TRAIN, step=step, history=list(read_lines(run.train_metrics)))
    with tracking.opened(job, settings, into=sinks):
        sinks.handle(Published(page_of(dataset.name)))
        yield MetricsWriter(run, list(dataset.schema.tasks), step, steps, sinks)


def _figures(record: dict[str, Any]) -> str:
    words = []
    for figure, label in (("ne", "NE"), ("task_loss", "loss")):
        known = [f"{task} {short_decimal(value)}" for task, value in record[figure].items() if value is not None]
        words += [label, *known] if known else []
    return " ".join(words)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
