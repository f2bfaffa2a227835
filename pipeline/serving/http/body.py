"""The body of a request for scores: read within limits, and what it must be."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from features.errors import one_line
from features.plain_json import INT64_LIMIT
from features.printable import printable
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics

RETRY = {"retry-after": "1"}
KEYS = ("user", "candidates")


class RefusedError(Exception):
    """A request that gets no scores: a status of HTTP, a line that says why, headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Asked(NamedTuple):
    """What a request asks for."""

    rows: Sequence[Mapping[str, Any]]
    user: Mapping[str, Any] | None


async def read_body(request: Request, settings: ServeConfig, metrics: Metrics, held: list[int]) -> bytes:
    """The body, refused while it is read once it is too large.

    Args:
        held: bytes that this request holds so far, which the caller gives back: `metrics.buffered` counts those of all.
    Raises:
        RefusedError: it is no plain JSON by its type, too large, or the server holds too much.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"content-type {printable(kind[:100]) or '(none)'} is not application/json")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise RefusedError(415, f"content-encoding {printable(coding[:100])}: send the body as it is")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > settings.max_body_bytes):
        raise too_large(settings)
    body = bytearray()
    try:
        async for part in request.stream():
            if len(body) + len(part) > settings.max_body_bytes:
                raise too_large(settings)
            held[0] += len(part)
            metrics.hold(len(part))
            if metrics.held > settings.max_buffered_bytes:
                raise RefusedError(503, "the server holds too many bytes of requests: try again", RETRY)
            body += part
    except ClientDisconnect:
        raise RefusedError(400, "the client is gone") from None
    return bytes(body)


def too_large(settings: ServeConfig) -> RefusedError:
    """The refusal of a body."""
    return RefusedError(413, f"the body has more than {settings.max_body_bytes:,} bytes (max_body_bytes)")


def asked(body: bytes, max_rows: int) -> Asked:
    """What a body asks for. Raises RefusedError."""
    try:
        content = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise unreadable(body, error) from None
    if not isinstance(content, dict):
        raise RefusedError(422, "the body is not an object with the keys user and candidates")
    if unknown := content.keys() - set(KEYS):
        raise RefusedError(422, f"{printable(min(unknown)[:100])}: unknown key, allowed are {', '.join(KEYS)}")
    rows, user = content.get("candidates"), content.get("user")
    if not isinstance(rows, list):
        raise RefusedError(422, f"candidates: {'is missing' if rows is None else 'is not a list'}")
    if len(rows) > max_rows:
        raise RefusedError(422, f"candidates: {len(rows):,} rows, more than {max_rows:,} (max_rows)")
    if user is not None and not isinstance(user, dict):
        raise RefusedError(422, "user: is not an object")
    if set(map(type, rows)) - {dict}:
        place = next(place for place, row in enumerate(rows) if type(row) is not dict)
        raise RefusedError(422, f"candidates[{place}]: is not an object")
    return Asked(rows, user)


def unreadable(body: bytes, error: ValueError) -> RefusedError:
    """Why a body is no JSON; of NaN and Infinity, which some programs write, the field that has it."""
    if "recursion" in str(error):
        return RefusedError(422, "the body is nested too deep")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return RefusedError(400, f"the body is no JSON: {one_line(error)}")
    place = next(unfit_numbers(content, ""), None)
    return RefusedError(422, place or f"the body is no JSON: {one_line(error)}")


def unfit_numbers(content: Any, place: str) -> Any:
    """Messages of numbers that are not finite or have more than 64 bits."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from unfit_numbers(value, f"{place}.{printable(key[:100])}".lstrip("."))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from unfit_numbers(value, f"{place}[{number}]")
    elif isinstance(content, float) and not math.isfinite(content):
        yield f"{place}: {content} is not a finite number"
    elif isinstance(content, int) and not -INT64_LIMIT <= content < INT64_LIMIT:
        yield f"{place}: the number has more than 64 bits"
