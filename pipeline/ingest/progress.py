"""Progress of a pass that any runner's workers make: each file leaves a note of its bytes done, one thread adds them up."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from pipeline.terminal import SECONDS, draws_bars


class Share:
    """The part of a pass that one file is: a worker's note of how far it has read."""

    def __init__(self, folder: Path, index: int) -> None:
        self.path = folder / f"{index:05d}"
        self.seen = 0.0

    def note(self, bytes_done: int) -> None:
        """Leaves the note, at most five times a second."""
        if time.monotonic() - self.seen > 0.2:
            self.path.write_text(str(bytes_done))
            self.seen = time.monotonic()


class Progress:
    """While the body runs: a bar on a terminal, elsewhere a line every 10 s and one at the end."""

    def __init__(self, name: str, files: list[str], folder: Path) -> None:
        self.name, self.folder = name, folder
        self.total = sum(Path(f).stat().st_size for f in files)
        self.bar = tqdm(
            total=self.total, desc=f"{name:6}", unit="B", unit_scale=True, dynamic_ncols=True, disable=not draws_bars()
        )
        self.begin = self.said = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done.wait(0.2):
            noted = min(sum(int(path.read_text() or 0) for path in self.folder.iterdir()), self.total)
            self.bar.update(max(0, noted - self.bar.n))
            if self.bar.disable and time.monotonic() - self.said > SECONDS:
                self.said = time.monotonic()
                self._say(noted)

    def _say(self, noted: int) -> None:
        seconds = time.monotonic() - self.begin
        rate = noted / seconds
        left = f"left {(self.total - noted) / rate:.0f} s" if 0 < noted < self.total else f"{seconds:.1f} s"
        print(
            f"{self.name:6}  {noted / 1e6:,.1f}/{self.total / 1e6:,.1f} MB  {rate / 1e6:.1f} MB/s  {left}",
            file=sys.stderr,
        )

    def __enter__(self) -> "Progress":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.done.set()
        self.thread.join()
        if error is None:
            self.bar.update(self.total - self.bar.n)
            if self.bar.disable:
                self._say(self.total)
        self.bar.close()
