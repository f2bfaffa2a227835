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
FINAL_NUMBERS = (
    errno.EINVAL,
    errno.ENAMETOOLONG,
)  # of an OSError; s3fs answers a condition that does not hold with EINVAL


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
        retry=retry_if_exception(_may_pass),
    )  # fmt: skip
    try:
        return retrying(call, *arguments, **named)
    except Exception as error:  # each store has exceptions of its own
        if not _may_pass(error):
            raise
        reason = f"the store has not answered for {limit:g} s: {one_line(error)}"
        raise OSError(errno.ETIMEDOUT, reason, str(what)) from None


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may succeed."""
    is_final = isinstance(error, FINAL) or (isinstance(error, OSError) and error.errno in FINAL_NUMBERS)
    return isinstance(error, Exception) and not is_final
