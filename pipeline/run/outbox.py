"""Small files of a run on a store, put by a thread: training does not wait for a store that is slow or away."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from features.errors import one_line
from pipeline.storage.files import json_text, storage_of

EVERY_S = 5.0  # between puts at least
SHARE = 0.1  # of the time that may go into putting: a file that has grown large is put less often

logger = logging.getLogger(__name__)


class Outbox:
    """Files whose last content is put every few seconds, and at once by `flush`. One that cannot be put is tried again.

    A store cannot append: a file of lines is kept in memory, and put whole.

    Args:
        lost: whether the run is another process's by now: then nothing is put any more.
    """

    def __init__(self, lost: Callable[[], bool] = lambda: False) -> None:
        self.lost = lost
        self.changed: dict[Path, Callable[[], bytes]] = {}
        self.lines: dict[Path, bytearray] = {}
        self.guard, self.putting = threading.Lock(), threading.Lock()  # of the dictionaries, held briefly; of the store
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True, name="outbox")
        self.thread.start()

    def put(self, path: Path, content: Callable[[], bytes]) -> None:
        """Lets a file have the content that the call will return."""
        with self.guard:
            self.changed[path] = content

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """Adds a JSON line to what the file has. Raises OSError, where the file has not been read yet."""
        if path not in self.lines:
            self.lines[path] = bytearray(path.read_bytes() if path.exists() else b"")
        line = json_text(record).encode() + b"\n"
        with self.guard:
            self.lines[path] += line
            self.changed[path] = lambda: bytes(self.lines[path])

    def reload(self) -> None:
        """Forgets the lines of files, which others have changed since the last `flush`."""
        with self.guard:
            self.lines.clear()

    def flush(self) -> None:
        """Puts what has changed. Raises OSError where the store does not take it, which is tried again later."""
        with self.putting:
            while not self.lost():
                with self.guard:
                    if not self.changed:
                        return
                    path, content = next(iter(self.changed.items()))
                    current = content()
                    del self.changed[path]
                try:
                    storage_of(path).write(path, current)
                except BaseException:
                    with self.guard:
                        self.changed.setdefault(path, content)
                    raise

    def close(self) -> bool:
        """Ends the thread and puts what is left; whether all of it could be."""
        self.ended.set()
        try:
            self.flush()
        except OSError as error:
            logger.warning(f"{_where(error)} The run's last lines are not written.")
            return False
        finally:
            self.thread.join(EVERY_S)
        return True

    def _work(self) -> None:
        pause, said = EVERY_S, False
        while not self.ended.wait(pause):
            begin = time.monotonic()
            try:
                self.flush()
                said = False
            except OSError as error:
                if not said:
                    logger.warning(f"{_where(error)} Its lines are kept in memory until then; training goes on.")
                said = True
            pause = max(EVERY_S, (time.monotonic() - begin) / SHARE)


def _where(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}." if error.strerror and error.filename else f"{one_line(error)}."
