"""The terminal of a running job: text that does not control it, output into a pipe, and progress bars or lines."""

import atexit
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from features.printable import printable

SECONDS = 10  # between lines of progress where there are no bars


class PrintableStream:
    """A text stream on which control characters appear as escapes, but for line breaks and tabs; all else is the stream's.

    Args:
        stream: what is written to.
        start: control characters that stay at the beginning of a text, such as the carriage return of a progress bar.
    """

    def __init__(self, stream: TextIO, start: str = "") -> None:
        self._stream, self._start = stream, start

    def write(self, text: str) -> int:
        """Writes a text with its control characters as escapes. Returns its length."""
        start = self._start if text.startswith(self._start) else ""
        self._stream.write(start + printable(text[len(start) :], keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PipedOutput(PrintableStream):
    """Standard output, which whoever reads it may close, as `head` does: the process then ends as other tools do."""

    def write(self, text: str) -> int:
        """See PrintableStream. Raises SystemExit where nobody reads any more."""
        with self._until_closed():
            return super().write(text)

    def flush(self) -> None:
        """Writes what is buffered. Raises SystemExit where nobody reads any more."""
        with self._until_closed():
            self._stream.flush()

    @contextmanager
    def _until_closed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.discard()
            sys.exit(128 + signal.SIGPIPE)

    def discard(self) -> None:
        """Discards what is still buffered and whatever else is printed: Python flushes the stream once more as it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def escape_output() -> None:
    """From now on text that this process prints (tables, errors, log lines, warnings, tracebacks) controls no terminal.

    Text of data is in all of it: values, names of files and columns, arguments. Where the reader of standard output has gone,
    the process ends without a traceback, with exit code 141 (128 + SIGPIPE) unless it was about to end anyway.
    """
    os.environ["PYTHON_COLORS"] = "0"  # Python 3.13 colors tracebacks, and its colors would be escaped, too
    if not isinstance(sys.stdout, PrintableStream):
        output = PipedOutput(sys.stdout)
        sys.stdout = cast("TextIO", output)
        atexit.register(_flush_at_exit, output)
    if not isinstance(sys.stderr, PrintableStream):
        sys.stderr = cast("TextIO", PrintableStream(sys.stderr, "\r"))


def _flush_at_exit(output: PipedOutput) -> None:
    """Flushes before Python does, which would print an error of its own."""
    with suppress(SystemExit, ValueError):  # a stream that was closed is a ValueError
        output.flush()


def draws_bars() -> bool:
    """Whether progress is drawn as bars: on a terminal, unless TASKFUSE_LINES is set, as where several jobs share one."""
    return sys.stderr.isatty() and not os.environ.get("TASKFUSE_LINES")


def short_decimal(value: float, digits: int = 4) -> str:
    """A number with `digits` decimals and without a leading zero: .8123, -.0400, 10.6000."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
