"""The terminal of a running job: progress bars or lines, and the silence of child processes."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

SECONDS = 10  # between lines of progress where there are no bars


def draws_bars() -> bool:
    """Whether progress is drawn as bars: on a terminal, unless TASKFUSE_LINES is set, as where several jobs share one."""
    return sys.stderr.isatty() and not os.environ.get("TASKFUSE_LINES")


def short_decimal(value: float, digits: int = 4) -> str:
    """A number with `digits` decimals and without a leading zero: .8123, -.0400, 10.6000."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


@contextmanager
def quiet_children() -> Iterator[None]:
    """Discards what processes started meanwhile write to stderr; this process's own lines and log records still appear."""
    sys.stderr.flush()
    ours, stderr = os.dup(2), sys.stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        sys.stderr = os.fdopen(os.dup(ours), "w", buffering=1)
        _redirect_logging(stderr, sys.stderr)
        yield
    finally:
        _redirect_logging(sys.stderr, stderr)
        sys.stderr.close()
        sys.stderr = stderr
        os.dup2(ours, 2)
        os.close(ours)
        os.close(nowhere)


def _redirect_logging(before: TextIO, after: TextIO) -> None:
    """Makes the root logger's handlers of one stream write to another: they keep the stream that they began with."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
