"""Calls to a store, repeated while it does not answer."""

import asyncio
import errno
import http.client
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from features.errors import UserError, one_line

T = TypeVar("T")
TIMEOUT = "TASKFUSE_STORE_TIMEOUT"  # environment: seconds for which a store may fail to answer
TIMEOUT_S = 120.0
SILENCE_S = 1.0  # after which it is worth a line
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # between tries

# Errors of an OSError that another try may not meet; None is of those that a library raises with a text alone.
PASSING_NUMBERS = {
    None, errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE,
    errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EAGAIN, errno.EINTR, errno.ENOTCONN,
}  # fmt: skip
FINAL_ERRORS = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, BlockingIOError,
)  # fmt: skip
# Statuses and S3's codes of answers to repeat; others below 500 are final, and NOT_IMPLEMENTED.
PASSING_STATUSES = {408, 409, 425, 429}
NOT_IMPLEMENTED, CONDITION_FAILED = 501, 412
PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch", "SlowDown"}
# Packages of stores: what they raise is a failure of the store, unless its name says that asking again changes nothing.
LIBRARIES = {
    "botocore",
    "aiobotocore",
    "aiohttp",
    "gcsfs",
    "google",
    "azure",
    "adlfs",
    "urllib3",
    "requests",
    "pyarrow",
}
STATUS_NAMES = {"azure": "status_code", "gcsfs": "code"}  # attributes with the status of an answer
FINAL_NAMES = re.compile(  # not CredentialRetrievalError: a service of credentials may answer again
    "NoCredentials|PartialCredentials|DefaultCredentials|CredentialUnavailable|AuthToken|UnauthorizedSSO|Authentication|"
    "ParamValidation|Profile|Config|Unknown|InvalidRegion"
)
SECRET_NAMES = r"[?&][^=&]*(sig|token|key|secret|password|credential)[^=&]*="  # of a query

_silent: dict[str, float] = {}  # stores that do not answer, and since when
_silent_lock = threading.Lock()
_logger = logging.getLogger(__name__)


def time_limit() -> float:
    """Seconds for which a store may fail to answer: TASKFUSE_STORE_TIMEOUT, or TIMEOUT_S. Raises UserError for no number."""
    text = os.environ.get(TIMEOUT) or TIMEOUT_S
    with suppress(ValueError):
        if (limit := float(text)) >= 0:  # not nan, after which no call would end
            return limit
    raise UserError(f"{TIMEOUT}={text} in the environment is no number of seconds: change or unset it.")


def patiently(what: object, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """What a call returns, which is repeated with growing pauses until the store has answered.

    Args:
        what: the path, for errors and the log.
    Raises:
        OSError: the store's own answer (no such file, no permission; ESTALE: a condition of the call does not hold), or
            ETIMEDOUT for none for `time_limit` seconds; with the path, and without what is secret.
    """
    return patiently_for(time_limit(), what, call, *arguments, **named)


def patiently_for(limit: float, what: object, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """`patiently`, with the seconds after which no further try begins."""
    started = time.monotonic()

    def before_sleep(state: RetryCallState) -> None:
        if time.monotonic() - started >= min(SILENCE_S, limit / 2):
            assert state.outcome is not None
            _log_silence(what, started, limit, state.outcome.exception())

    retrying = Retrying(
        stop=stop_after_delay(limit),
        wait=wait_random_exponential(FIRST_PAUSE_S, min(LONGEST_PAUSE_S, limit / 4)),
        retry=retry_if_exception(may_pass),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        found = retrying(call, *arguments, **named)
    except Exception as error:  # each store has exceptions of its own
        _raise(what, limit, error)
    if _silent:
        _log_answer(what)
    return found


def may_pass(error: BaseException) -> bool:
    """Whether asking again may succeed."""
    if not isinstance(error, Exception):
        return False
    status, code = _answer(error)
    if code in PASSING_CODES or status in PASSING_STATUSES or ((status or 0) >= 500 and status != NOT_IMPLEMENTED):
        return True
    if isinstance(error, FINAL_ERRORS) or status is not None:
        return False
    if isinstance(error, asyncio.TimeoutError | TimeoutError | http.client.HTTPException | EOFError):
        return True
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return error.errno in PASSING_NUMBERS
    library = type(error).__module__.partition(".")[0]
    return library in LIBRARIES and not FINAL_NAMES.search(type(error).__name__)


def _answer(error: Exception) -> tuple[int | None, str | None]:
    """The status and S3's code of an answer that an error stands for, where it has them."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, response.get("Error", {}).get("Code")
        name = STATUS_NAMES.get(type(each).__module__.partition(".")[0])
        if name and isinstance(status := getattr(each, name, None), int):
            return status, None
    return None, None


def _raise(what: object, limit: float, error: Exception) -> NoReturn:
    """Raises an error as an OSError with the path; one that is no store's own as it is."""
    if may_pass(error):
        reason = f"the store has not answered for {limit:g} s: {without_secrets(one_line(error))}"
        raise OSError(errno.ETIMEDOUT, reason, str(what)) from None
    if isinstance(error, FileNotFoundError) or _answer(error)[0] == 404:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(what)) from None
    if _answer(error)[0] == CONDITION_FAILED:
        raise OSError(errno.ESTALE, "changed by another writer", str(what)) from None
    if isinstance(error, FileExistsError):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(what)) from None
    text = without_secrets((isinstance(error, OSError) and error.strerror) or one_line(error))
    if (
        isinstance(error, PermissionError)
        or _answer(error)[0] in (401, 403)
        or FINAL_NAMES.search(type(error).__name__)
    ):
        raise PermissionError(errno.EACCES, f"the store refuses: {text}", str(what)) from None
    if isinstance(error, OSError):
        number = error.errno or {IsADirectoryError: errno.EISDIR, NotADirectoryError: errno.ENOTDIR}.get(
            type(error), errno.EIO
        )
        raise OSError(number, text, str(what)) from None
    if type(error).__module__.partition(".")[0] in LIBRARIES:
        raise OSError(errno.EIO, text, str(what)) from None
    raise error


def cure_of(error: Exception, damaged: str) -> str:
    """What to do about a file that cannot be read: `damaged`, unless its store does not answer or refuses."""
    unavailable = isinstance(error, OSError) and error.errno in (errno.ETIMEDOUT, errno.EACCES)
    on_store = isinstance(error, OSError) and "://" in str(error.filename)
    return "Run the same command again once its store gives it." if unavailable and on_store else damaged


def without_secrets(text: str) -> str:
    """A text without passwords in URLs, signatures in queries, and the values of secret variables of the environment."""
    text = re.sub(r"//[^/\s@]*@", "//…@", text)
    text = re.sub(r"(?i)((?:sig|signature|token|password|secret|credential|key)[\w-]*=)[^&\s\"']+", r"\1…", text)
    for name, value in os.environ.items():
        if len(value) > 5 and re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|CONNECTION_STRING", name):
            text = text.replace(value, "…")
    return text


def has_secret(scheme: str, rest: str) -> bool:
    """Whether what follows a scheme may hold one: a user's password, which may have slashes, or a signed query."""
    first, _, others = rest.partition("/")
    if ":" in (re.sub(r":\d+$", "", first) if scheme in ("hdfs", "webhdfs") else first) or "@" in others:
        return True
    return re.search(SECRET_NAMES, rest, re.IGNORECASE) is not None


def missing(path: object) -> FileNotFoundError:
    """The error of a path that does not exist."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _store_of(what: object) -> str:
    return "/".join(str(what).split("/")[:3])


def _log_silence(what: object, started: float, limit: float, error: Any) -> None:
    store = _store_of(what)
    with _silent_lock:
        known = store in _silent
        _silent.setdefault(store, started)
    if not known:
        reason = without_secrets(one_line(error))
        _logger.warning("%s does not answer, and is asked again for up to %g s: %s", store, limit, reason)


def _log_answer(what: object) -> None:
    store = _store_of(what)
    with _silent_lock:
        since = _silent.pop(store, None)
    if since is not None:
        _logger.warning("%s answers again, after %.0f s", store, time.monotonic() - since)
