"""Small files of a run on a store, put by a thread: training does not wait for a store that is slow or away."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
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
            self.changed[path] = partial(self._copy_of, self.lines[path])

    def reload(self) -> None:
        """Forgets the lines of files, which others have changed since the last `flush`."""
        with self.guard:
            self.lines.clear()

    def _copy_of(self, lines: bytearray) -> bytes:
        with self.guard:
            return bytes(lines)

    def flush(self, only_lines: bool = False) -> None:
        """Puts what has changed, or of it only files of lines. Raises OSError where one cannot be, which is tried again later.

        One whose content cannot be had, as a file of a full disk, keeps none of the others back.
        """
        with self.putting:
            with self.guard:
                due = [path for path in self.changed if not only_lines or path in self.lines]
            failed: OSError | None = None
            for path in due:
                if self.lost():
                    return
                with self.guard:
                    content = self.changed.pop(path, None)
                if content is None:  # forgotten meanwhile
                    continue
                try:
                    failed = self._put(path, content) or failed
                except BaseException:
                    with self.guard:
                        self.changed.setdefault(path, content)
                    raise
            if failed:
                raise failed

    def _put(self, path: Path, content: Callable[[], bytes]) -> OSError | None:
        """Writes a file, and returns why its content is not there. Raises OSError of the store."""
        try:
            current = content()
        except Exception as error:  # of a sink's library: it must end neither the thread nor training
            with self.guard:
                self.changed.setdefault(path, content)
            return error if isinstance(error, OSError) else OSError(errno.EIO, one_line(error), str(path))
        storage_of(path).write(path, current)
        return None

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
