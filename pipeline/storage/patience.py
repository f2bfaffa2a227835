"""Calls to a store, repeated while it does not answer."""

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from features.errors import one_line

T = TypeVar("T")
TIMEOUT = "TASKFUSE_STORE_TIMEOUT"  # environment: seconds for which a store may fail to answer
TIMEOUT_S = 120.0

# What asking again does not change.
FINAL = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError, TypeError,
    ValueError, NotImplementedError, AttributeError, KeyError,
)  # fmt: skip


def patiently(what: object, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """What a call returns, which is repeated with growing pauses until the store has answered.

    Args:
        what: the path, for the error.
    Raises:
        OSError: the store's own answer (no such file, no permission), or none for TASKFUSE_STORE_TIMEOUT seconds.
    """
    limit = float(os.environ.get(TIMEOUT, TIMEOUT_S))
    retrying = Retrying(
        stop=stop_after_delay(limit), wait=wait_random_exponential(multiplier=0.2, max=5), reraise=True,
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, FINAL)),
    )  # fmt: skip
    try:
        return retrying(call, *arguments, **named)
    except FINAL:
        raise
    except Exception as error:  # each store has exceptions of its own
        reason = f"the store has not answered for {limit:g} s: {one_line(error)}"
        raise OSError(errno.ETIMEDOUT, reason, str(what)) from None
