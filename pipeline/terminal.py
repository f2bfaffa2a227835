"""Whether progress may be drawn over and over in one place."""

import os
import sys

SECONDS = 10  # between lines where it may not


def draws_bars() -> bool:
    """True on a terminal, unless TASKFUSE_LINES is set, as it is where several jobs write to one."""
    return sys.stderr.isatty() and not os.environ.get("TASKFUSE_LINES")
