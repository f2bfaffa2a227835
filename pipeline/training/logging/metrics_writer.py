"""Metrics of a run in training: train.jsonl, progressive.jsonl, TensorBoard, and progress on the terminal."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from features.errors import UserError
from pipeline.run.run import Run
from pipeline.storage.files import append_line, make_folder
from pipeline.terminal import SECONDS, draws_bars, short_decimal

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes metrics, and shows progress: a bar on a terminal, a log line every 10 s elsewhere.

    Args:
        run: where the files go. tasks: their names. step, steps: where the run starts and ends.
    """

    def __init__(self, run: Run, tasks: list[str], step: int, steps: int) -> None:
        self.run, self.tasks, self.steps = run, tasks, steps
        self.board = SummaryWriter(str(make_folder(run.tensorboard)), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if draws_bars() else None
        self.logged = 0.0
        self.drawing = True
        self.unwritten: list[tuple[Path, dict[str, Any]]] = []

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record: step, rows, left_out, epoch, lr, loss, weight, ne and task_loss (per task), rows_per_s, data_wait,
        seconds_left.
        """
        self._write(self.run.train_metrics, record)
        scalars = {f"train/{key}": record[key] for key in ("lr", "loss", "rows_per_s", "data_wait")}
        for key in ("weight", "ne", "task_loss"):
            scalars |= {f"train_{key}/{task}": value for task, value in record[key].items() if value is not None}
        self._draw(scalars, record["step"])
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
        with suppress(OSError):  # a full disk costs curves, not the run
            self.board.close()
            self.board = SummaryWriter(str(self.run.tensorboard), purge_step=step + 1)

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
                append_line(*self.unwritten[0])
                del self.unwritten[0]
        except OSError as error:
            if first:
                logger.warning(
                    f"{path}: cannot be written: {error.strerror}. Free space; its lines are kept in memory until then."
                )

    def _draw(self, scalars: dict[str, float], step: int) -> None:
        try:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            if self.drawing:
                logger.warning(f"{self.run.tensorboard}: cannot be written: {error.strerror}. Its curves end here.")
            self.drawing = False

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard. Raises UserError where lines could not be written."""
        with suppress(OSError):  # a full disk costs curves, not the run
            self.board.close()
        if self.bar is not None:
            self.bar.close()
        if self.unwritten:
            raise UserError(
                f"{self.unwritten[0][0]}: {len(self.unwritten)} lines of metrics could not be written: free space"
            )


def _figures(record: dict[str, Any]) -> str:
    words = []
    for figure, label in (("ne", "NE"), ("task_loss", "loss")):
        known = [f"{task} {short_decimal(value)}" for task, value in record[figure].items() if value is not None]
        words += [label, *known] if known else []
    return " ".join(words)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
