"""A night's outcome as JSON to a webhook, whose URL is a secret: it comes from the environment and is never logged."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import urllib3
from urllib3.util import parse_url

from features.errors import UserError
from pipeline.storage.files import json_text

VARIABLE = "TASKFUSE_WEBHOOK"
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
TIMEOUT_S = 10.0  # of an attempt
WAITS_S = (1.0, 2.0, 4.0)  # before another one
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers after which another attempt may succeed

logger = logging.getLogger(__name__)


def webhook_url() -> str:
    """The URL of the environment. Raises UserError where it is missing, or would send the outcome in clear over a network."""
    if not (found := os.environ.get(VARIABLE)):
        raise UserError(
            f"webhook=true: the environment variable {VARIABLE} is not set. Set it to the URL, or webhook=false."
        )
    try:
        url = parse_url(found)
    except urllib3.exceptions.HTTPError:  # its message has the URL
        raise UserError(f"{VARIABLE} is no URL. Set it to an https: one.") from None
    if not url.host or (url.scheme != "https" and not (url.scheme == "http" and url.host in LOOPBACK)):
        raise UserError(f"{VARIABLE} is no https: URL, and http: is for this machine alone (127.0.0.1). Set it to one.")
    return found


def post(url: str, message: dict[str, Any]) -> bool:
    """Posts a message, and again after a failure that may pass. Returns whether it arrived; a failure is a warning.

    urllib3 retries by itself, too, but logs the URL when it does.
    """
    reason = ""
    with _quiet_library(), urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(TIMEOUT_S)) as pool:
        for wait in (*WAITS_S, None):
            try:
                answer = pool.request(
                    "POST", url, body=json_text(message), headers={"Content-Type": "application/json"}, redirect=False,
                    preload_content=False,
                )  # fmt: skip
                answer.close()  # unread: its body may be endless, or come a byte at a time
            except urllib3.exceptions.HTTPError as error:  # its message has the URL
                reason = type(error).__name__
            else:
                if 200 <= answer.status < 300:
                    return True
                reason = f"answer {answer.status}"
                if answer.status not in PASSING:
                    break
            if wait is not None:
                time.sleep(wait)
    logger.warning("webhook: the outcome was not delivered (%s)", reason)
    return False


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Within it urllib3 logs nothing: its lines of a request, some of them warnings, have the URL."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "urllib3"]
    loggers = [found for name in names if not (found := logging.getLogger(name)).disabled]
    for found in loggers:
        found.disabled = True
    try:
        yield
    finally:
        for found in loggers:
            found.disabled = False
