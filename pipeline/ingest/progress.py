"""Progress of a job that any runner's workers do: they leave notes in a folder, and one thread adds them up."""

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from pipeline.terminal import SECONDS, draws_bars


class Share:
    """The part of `read` that one unit is: a worker's note of how many bytes it has read."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"read-{number:06d}"
        self.seen = 0.0

    def note(self, bytes_done: int) -> None:
        """Leaves the note, at most five times a second."""
        if time.monotonic() - self.seen > 0.2:
            with suppress(OSError):  # a full disk stops the job where it writes rows
                self.path.write_text(str(bytes_done))
            self.seen = time.monotonic()


class Progress:
    """While the body runs: a bar a step on a terminal, elsewhere a line every 10 s and one at the end of each step.

    Args:
        folder: where notes lie: STEP.total for the work items of a step, STEP-* one for each that is done; those of read
            hold bytes.
        total_bytes: that `read` has to read.
    """

    def __init__(self, folder: Path, steps: list[str], total_bytes: int) -> None:
        self.folder, self.steps, self.total_bytes = folder, steps, total_bytes
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        for step in self.steps:
            while step != "read" and not (self.folder / f"{step}.total").exists():
                if self.done.wait(0.05):
                    return
            if not self._follow(step):
                return

    def _follow(self, step: str) -> bool:
        """One step, to its end (true) or the job's."""
        isbytes = step == "read"
        total = self.total_bytes if isbytes else int((self.folder / f"{step}.total").read_text())
        unit = {"unit": "B", "unit_scale": True} if isbytes else {"unit": "it"}
        following = dict(zip(self.steps, self.steps[1:], strict=False)).get(step)
        begin = said = time.monotonic()
        with tqdm(total=total, desc=f"{step:8}", dynamic_ncols=True, disable=not draws_bars(), **unit) as bar:
            while True:
                ended = (self.folder / f"{following}.total").exists() if following else False
                stopped = self.done.wait(0 if ended else 0.1)
                whole = ended or (stopped and not following)
                noted = total if whole else self._noted(step, total)
                bar.update(max(0, noted - bar.n))
                if bar.disable and (whole or time.monotonic() - said > SECONDS):
                    said = time.monotonic()
                    _say(step, noted, total, said - begin)
                if ended or stopped:
                    return ended

    def _noted(self, step: str, total: int) -> int:
        notes = list(self.folder.glob(f"{step}-*"))
        return min(total, sum(int(n.read_text() or 0) for n in notes) if step == "read" else len(notes))

    def __enter__(self) -> "Progress":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.failed = error is not None
        self.done.set()
        self.thread.join()


def _say(step: str, noted: int, total: int, seconds: float) -> None:
    left = f"left {seconds * (total - noted) / noted:.0f} s" if 0 < noted < total else f"{seconds:.1f} s"
    amount = (
        f"{noted / 1e6:,.1f}/{total / 1e6:,.1f} MB  {noted / 1e6 / max(seconds, 1e-9):.1f} MB/s"
        if step == "read"
        else f"{noted}/{total}"
    )
    print(f"{step:8}  {amount}  {left}", file=sys.stderr)
