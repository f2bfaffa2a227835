"""Progress of a pass that any runner's workers make: each file leaves a note of its bytes done, one thread adds them up."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

SECONDS = 10  # between lines where there is no terminal


class Share:
    """The part of a pass that one file is: a worker's note of how far it has read."""

    def __init__(self, folder: Path, index: int) -> None:
        self.path = folder / f"{index:05d}"
        self.seen = 0.0

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, bytes_done: int) -> None:
        """Leaves the note, at most five times a second."""
        if time.monotonic() - self.seen > 0.2:
            self.path.write_text(str(bytes_done))
            self.seen = time.monotonic()


class Progress:
    """A bar on a terminal, a line every `SECONDS` elsewhere, while the body runs."""

    def __init__(self, name: str, files: list[str], folder: Path) -> None:
        self.folder = folder
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(Path(f).stat().st_size for f in files),
            desc=f"{name:6}",
            unit="B",
            unit_scale=True,
            mininterval=0.2 if terminal else SECONDS,
            dynamic_ncols=terminal,
        )
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done.wait(0.2):
            noted = sum(int(path.read_text() or 0) for path in self.folder.iterdir())
            self.bar.update(max(0, min(noted, self.bar.total or 0) - self.bar.n))

    def __enter__(self) -> "Progress":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.done.set()
        self.thread.join()
        if error is None:
            self.bar.update((self.bar.total or 0) - self.bar.n)
        self.bar.close()
