"""The terminal of a running job: text that does not control it, progress bars or lines, and quiet child processes."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

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


def escape_output() -> None:
    """From now on text that this process prints (tables, errors, log lines, warnings, tracebacks) controls no terminal.

    Text of data is in all of it: values, names of files and columns, arguments.
    """
    os.environ["PYTHON_COLORS"] = "0"  # Python 3.13 colors tracebacks, and its colors would be escaped, too
    for name, start in (("stdout", ""), ("stderr", "\r")):
        stream = getattr(sys, name)
        if not isinstance(stream, PrintableStream):
            setattr(sys, name, PrintableStream(stream, start))


def draws_bars() -> bool:
    """Whether progress is drawn as bars: on a terminal, unless TASKFUSE_LINES is set, as where several jobs share one."""
    return sys.stderr.isatty() and not os.environ.get("TASKFUSE_LINES")


def short_decimal(value: float, digits: int = 4) -> str:
    """A number with `digits` decimals and without a leading zero: .8123, -.0400, 10.6000."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
