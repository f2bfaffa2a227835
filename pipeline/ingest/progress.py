"""Progress of a job on any runner: workers record it as files in a folder, which one thread of the driver lists.

Names say it all, so that a listing is enough: STEP.total when a step begins, STEP-NUMBER for a piece of its work that is
done, and read-NUMBER-BYTES for a unit that is being read or done.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from pipeline.storage.files import write_json
from pipeline.storage.store_path import on_store
from pipeline.terminal import SECONDS, draws_bars

logger = logging.getLogger(__name__)

READ = "read"  # the step whose progress is counted in bytes
RECORD_S, LIST_S = 0.2, 0.1  # between two records of a unit, and two listings
STORE_RECORD_S, STORE_LIST_S = 5.0, 3.0  # on a store, which charges for both


class UnitProgress:
    """How many bytes of a unit the step `read` has read, in the name of a file."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.path: Path | None = None
        self.every = STORE_RECORD_S if on_store(folder) else RECORD_S
        self.written = time.monotonic()

    def record(self, bytes_done: int) -> None:
        """Records the number, now and then."""
        if time.monotonic() - self.written > self.every:
            with suppress(OSError):  # a full disk stops the job where it writes rows
                path = _read_file(self.folder, self.number, bytes_done)
                path.touch()
                if self.path and self.path != path:
                    self.path.unlink(missing_ok=True)
                self.path = path
            self.written = time.monotonic()


def record_done(folder: Path, step: str, number: int, begin: float, size: int = 0) -> None:
    """Records that a piece of a step's work is done, which began at `begin` (seconds since 1970).

    Args:
        size: bytes of a unit.
    """
    path = _read_file(folder, number, size) if step == READ else folder / f"{step}-{number:06d}"
    path.write_text(json.dumps([begin, time.time()]))


def record_total(folder: Path, step: str, count: int) -> None:
    """Records that a step begins, and how many pieces of work it has."""
    write_json(folder / f"{step}.total", [count, time.time()])


def times_of(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Step, begin and end of each piece that is done, and those at which a step begins; seconds since 1970."""
    for path in folder.iterdir():
        if not path.is_dir() and (text := path.read_text()):
            first, second = json.loads(text)
            step, is_piece, _ = path.name.partition("-")
            yield (step, first, second) if is_piece else (path.name, second, second)


def _read_file(folder: Path, number: int, size: int) -> Path:
    return folder / f"{READ}-{number:06d}-{size:015d}"


class Progress:
    """While the body runs: a bar for each step on a terminal, elsewhere a line every 10 s and at the end of each step.

    Args:
        folder: where workers record what they did.
        total_bytes: that `read` has to read.
    """

    def __init__(self, folder: Path, steps: list[str], total_bytes: int) -> None:
        self.folder, self.steps, self.total_bytes = folder, steps, total_bytes
        self.every = STORE_LIST_S if on_store(folder) else LIST_S
        self.names: set[str] = set()
        self.begin = time.time()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        with suppress(OSError):  # progress stops no job
            for step, following in zip(self.steps, [*self.steps[1:], ""], strict=True):
                while step != READ and f"{step}.total" not in self.names:
                    if self._list() and f"{step}.total" not in self.names:
                        return
                self._follow(step, following)

    def _list(self) -> bool:
        """Waits, then lists the folder; whether nothing is recorded any more."""
        job_ended = self.ended.wait(self.every)
        with suppress(OSError):  # a store that is gone for a while, which the steps bear or report
            self.names = {path.name for path in self.folder.iterdir()}
        return job_ended

    def _follow(self, step: str, following: str) -> None:
        """One step, to its end or the job's."""
        is_bytes = step == READ
        total, begin = (self.total_bytes, self.begin) if is_bytes else self._total(step)
        unit = {"unit": "B", "unit_scale": True} if is_bytes else {"unit": "it"}
        logged = time.monotonic()
        with tqdm(total=total, desc=f"{step:8}", dynamic_ncols=True, disable=not draws_bars(), **unit) as bar:
            while True:
                job_ended = f"{following}.total" not in self.names and self._list()
                step_ended = f"{following}.total" in self.names
                whole = step_ended or (job_ended and not following)
                done = total if whole else min(total, self._done(step))
                bar.update(max(0, done - bar.n))
                if bar.disable and (whole or time.monotonic() - logged > SECONDS):
                    logged = time.monotonic()
                    end = self._total(following)[1] if step_ended else time.time()
                    logger.info(line(step, done, total, max(0.0, end - begin)))
                if step_ended or job_ended:
                    return

    def _total(self, step: str) -> tuple[int, float]:
        """How many pieces a step has, and when it began."""
        count, begin = json.loads((self.folder / f"{step}.total").read_text())
        return count, begin

    def _done(self, step: str) -> int:
        """Bytes, or pieces."""
        pieces = {name for name in self.names if name.startswith(f"{step}-")}
        if step != READ:
            return len(pieces)
        units: dict[str, int] = {}
        for name in pieces:
            _, number, size = name.split("-")
            units[number] = max(units.get(number, 0), int(size))
        return sum(units.values())

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
