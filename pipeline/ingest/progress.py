"""Progress of a job on any runner: workers record it as files in a folder, which one thread of the driver adds up."""

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from pipeline.storage.files import write_json
from pipeline.terminal import SECONDS, draws_bars

logger = logging.getLogger(__name__)


class UnitProgress:
    """How many bytes of a unit the step `read` has read, in a file of its own."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"read-{number:06d}"
        self.written = 0.0

    def record(self, bytes_done: int) -> None:
        """Writes the number, at most five times a second."""
        if time.monotonic() - self.written > 0.2:
            with suppress(OSError):  # a full disk stops the job where it writes rows
                self.path.write_text(str(bytes_done))
            self.written = time.monotonic()


def record_done(folder: Path, step: str, number: int) -> None:
    """Records that a piece of a step's work is done."""
    (folder / f"{step}-{number:06d}").touch()


def record_total(folder: Path, step: str, count: int) -> None:
    """Records that a step begins, and how many pieces of work it has."""
    write_json(_total(folder, step), count)


def _total(folder: Path, step: str) -> Path:
    return folder / f"{step}.total"


class Progress:
    """While the body runs: a bar for each step on a terminal, elsewhere a line every 10 s and at the end of each step.

    Args:
        folder: where workers record what they did.
        total_bytes: that `read` has to read.
    """

    def __init__(self, folder: Path, steps: list[str], total_bytes: int) -> None:
        self.folder, self.steps, self.total_bytes = folder, steps, total_bytes
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        for step in self.steps:
            while step != "read" and not _total(self.folder, step).exists():
                if self.ended.wait(0.05):
                    return
            if not self._follow(step):
                return

    def _follow(self, step: str) -> bool:
        """One step, to its end (true) or the job's."""
        is_bytes = step == "read"
        total = self.total_bytes if is_bytes else int(_total(self.folder, step).read_text())
        unit = {"unit": "B", "unit_scale": True} if is_bytes else {"unit": "it"}
        following = dict(zip(self.steps, self.steps[1:], strict=False)).get(step)
        begin = logged = time.monotonic()
        with tqdm(total=total, desc=f"{step:8}", dynamic_ncols=True, disable=not draws_bars(), **unit) as bar:
            while True:
                step_ended = _total(self.folder, following).exists() if following else False
                job_ended = self.ended.wait(0 if step_ended else 0.1)
                whole = step_ended or (job_ended and not following)
                done = total if whole else self._done(step, total)
                bar.update(max(0, done - bar.n))
                if bar.disable and (whole or time.monotonic() - logged > SECONDS):
                    logged = time.monotonic()
                    logger.info(line(step, done, total, logged - begin))
                if step_ended or job_ended:
                    return step_ended

    def _done(self, step: str, total: int) -> int:
        files = list(self.folder.glob(f"{step}-*"))
        return min(total, sum(int(file.read_text() or 0) for file in files) if step == "read" else len(files))

    def __enter__(self) -> "Progress":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.ended.set()
        self.thread.join()


def line(step: str, done: int, total: int, seconds: float) -> str:
    """One line of progress: share done, rate, and time left or taken."""
    left = f"left {seconds * (total - done) / done:.0f} s" if 0 < done < total else f"{seconds:.1f} s"
    amount = (
        f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB  {done / 1e6 / max(seconds, 1e-9):.1f} MB/s"
        if step == "read"
        else f"{done}/{total}"
    )
    return f"{step:8}  {amount}  {left}"
