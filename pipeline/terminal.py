"""What a person sees of a job while it runs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10  # between lines where it may not


def draws_bars() -> bool:
    """True on a terminal, unless TASKFUSE_LINES is set, as it is where several jobs write to one."""
    return sys.stderr.isatty() and not os.environ.get("TASKFUSE_LINES")


def short_decimal(value: float, digits: int = 4) -> str:
    """A number with `digits` decimals and without a leading zero: .8123, -.0400, 10.6000."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


@contextmanager
def quiet_children() -> Iterator[None]:
    """What processes that start meanwhile write to stderr goes nowhere; our own lines still appear."""
    sys.stderr.flush()
    ours, stderr = os.dup(2), sys.stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        sys.stderr = os.fdopen(os.dup(ours), "w", buffering=1)
        yield
    finally:
        sys.stderr.close()
        sys.stderr = stderr
        os.dup2(ours, 2)
        os.close(ours)
        os.close(nowhere)
