"""What a person and train.jsonl are told while a run goes on."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from features.errors import UserError
from pipeline.run.run import Run
from pipeline.storage.files import append_line
from pipeline.terminal import SECONDS, draws_bars, short_decimal


class Reporter:
    """Writes train.jsonl and TensorBoard, and shows progress: a bar on a terminal, a line every 10 s elsewhere.

    Args:
        run: where the files go. tasks: their names. step, steps: where the run starts and ends.
    """

    def __init__(self, run: Run, tasks: list[str], step: int, steps: int) -> None:
        self.run, self.tasks, self.steps = run, tasks, steps
        self.board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if draws_bars() else None
        self.said = 0.0
        self.drawing = True
        self.unwritten: list[tuple[Path, dict[str, Any]]] = []

    def log(self, record: dict[str, Any]) -> None:
        """Notes one record: step, rows, left_out, epoch, lr, loss, weight, ne and mse (per task), rows_per_s, data_wait,
        seconds_left.
        """
        self._write(self.run.train_metrics, record)
        scalars = {f"train/{key}": record[key] for key in ("lr", "loss", "rows_per_s", "data_wait")}
        for key in ("weight", "ne", "mse"):
            scalars |= {f"train_{key}/{task}": value for task, value in record[key].items() if value is not None}
        self._draw(scalars, record["step"])
        self.run.write_status("training", record["step"], self.steps)
        figures = _figures(record)
        rate = f"{record['rows_per_s']:,.0f} rows/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{rate}  {figures}  data wait {record['data_wait']:.1%}", refresh=False)
            self.bar.update(record["step"] - self.bar.n)
        elif time.monotonic() - self.said > SECONDS or record["step"] == self.steps:
            self.said = time.monotonic()
            minutes, seconds = divmod(int(record["seconds_left"]), 60)
            self.say(
                f"step {record['step']:,}/{self.steps:,}  rows {_short(record['rows'])}  {rate}  {figures}  "
                f"data wait {record['data_wait']:.1%}  left {minutes}m {seconds:02d}s"
            )

    def back_to(self, step: int) -> None:
        """Takes the curves of the steps after `step` back, which are taken again."""
        with suppress(OSError):
            self.board.close()
            self.board = SummaryWriter(str(self.run.tensorboard), purge_step=step + 1)

    def day(self, record: dict[str, Any]) -> None:
        """Notes one record of progressive.jsonl: epoch, day, step, rows, ne and mse of the batches of a day, or of an epoch."""
        self._write(self.run.progressive, record)
        if record["day"]:
            self.say(f"day {record['day']}  {_figures(record)}  (each batch before it was learnt from)")

    def _write(self, path: Path, record: dict[str, Any]) -> None:
        """Adds a line; what a full disk does not take is kept until it does."""
        first = not self.unwritten
        self.unwritten.append((path, record))
        try:
            while self.unwritten:
                append_line(*self.unwritten[0])
                del self.unwritten[0]
        except OSError as error:
            if first:
                self.say(f"{path}: cannot be written: {error.strerror}. Make room; its lines are kept until then.")

    def _draw(self, scalars: dict[str, float], step: int) -> None:
        try:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            if self.drawing:
                self.say(f"{self.run.tensorboard}: cannot be written: {error.strerror}. Its curves end here.")
            self.drawing = False

    def say(self, line: str) -> None:
        """One line for the person, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard. Raises UserError where lines could not be written."""
        with suppress(OSError):
            self.board.close()
        if self.bar is not None:
            self.bar.close()
        if self.unwritten:
            raise UserError(
                f"{self.unwritten[0][0]}: {len(self.unwritten)} lines of metrics could not be written: make room"
            )


def _figures(record: dict[str, Any]) -> str:
    words = []
    for figure in ("ne", "mse"):
        known = [f"{task} {short_decimal(value)}" for task, value in record[figure].items() if value is not None]
        words += [figure.upper(), *known] if known else []
    return " ".join(words)


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
