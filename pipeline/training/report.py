"""What a person and train.jsonl are told while a run goes on."""

import sys
import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.run import Run, append_line
from pipeline.terminal import SECONDS, draws_bars


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

    def log(self, record: dict[str, Any]) -> None:
        """Notes one record: step, rows, epoch, lr, loss, weight, ne and mse (per task), rows_per_s, data_wait, seconds_left."""
        append_line(self.run.train_metrics, record)
        for key in ("lr", "loss", "rows_per_s", "data_wait"):
            self.board.add_scalar(f"train/{key}", record[key], record["step"])
        for task, value in record["weight"].items():
            self.board.add_scalar(f"train_weight/{task}", value, record["step"])
        words = []
        for figure in ("ne", "mse"):
            known = {task: value for task, value in record[figure].items() if value is not None}
            for task, value in known.items():
                self.board.add_scalar(f"train_{figure}/{task}", value, record["step"])
            if known:
                words += [
                    figure.upper(),
                    *(f"{task} {value:.4f}".replace(" 0.", " .") for task, value in known.items()),
                ]
        self.run.say("training", record["step"], self.steps)
        figures = " ".join(words)
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

    def say(self, line: str) -> None:
        """One line for the person, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard."""
        self.board.close()
        if self.bar is not None:
            self.bar.close()


def _short(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
