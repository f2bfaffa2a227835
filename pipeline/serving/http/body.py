"""The body of a request for scores: read within limits, and what it must be."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from features.errors import one_line
from features.plain_json import INT64_LIMIT
from features.printable import printable
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Held

RETRY = {"retry-after": "1"}
KEYS = ("user", "candidates")
# Bytes that CPython takes for a number or short text and its place, after a comma, and for a list and an object.
SIZES = {b",": 56, b"[": 64, b"{": 192}


class RefusedError(Exception):
    """A request that gets no scores: a status of HTTP, a line that says why, headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Asked(NamedTuple):
    """What a request asks for."""

    rows: Sequence[Mapping[str, Any]]
    user: Mapping[str, Any] | None


async def read_body(request: Request, settings: ServeConfig, held: Held) -> bytes:
    """The body, refused while it is read once it is too large.

    Args:
        held: to which its bytes are added, and those of the values that it is parsed to; the caller releases them.
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
            hold(held, len(part), settings)
            body += part
    except ClientDisconnect:
        raise RefusedError(400, "the client is gone") from None
    hold(held, parsed_bytes(body), settings)
    return bytes(body)


def hold(held: Held, number: int, settings: ServeConfig) -> None:
    """Counts more bytes of a request. Raises RefusedError where it, or all together, would take too many."""
    most = settings.max_buffered_bytes
    if held.bytes + number > most:
        raise RefusedError(413, f"the body takes more than {most:,} bytes of memory (max_buffered_bytes)")
    if held.metrics.held + number > most:
        raise RefusedError(503, "the server holds too many bytes of requests: try again", RETRY)
    held.add(number)


def parsed_bytes(body: bytes | bytearray) -> int:
    """At most so many bytes the values of a JSON text take: each has a comma or bracket; a character is at most 4 bytes."""
    return 4 * len(body) + sum(body.count(mark) * size for mark, size in SIZES.items())


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
    return RefusedError(422, unfit_number(content) or f"the body is no JSON: {one_line(error)}")


def unfit_number(content: Any) -> str | None:
    """A message of the first number that is not finite or has more than 64 bits."""
    keys: list[Any] = []
    inside: list[Iterator[tuple[Any, Any]]] = [iter([("", content)])]
    while inside:  # without recursion: a client chooses how deep
        for key, value in inside[-1]:
            if isinstance(value, float) and not math.isfinite(value):
                return f"{place_of([*keys, key])}: {value} is not a finite number"
            if isinstance(value, int) and not -INT64_LIMIT <= value < INT64_LIMIT:
                return f"{place_of([*keys, key])}: the number has more than 64 bits"
            if isinstance(value, (dict, list)):
                items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
                keys.append(key)
                inside.append(iter(items))
                break
        else:
            inside.pop()
            del keys[-1:]
    return None


def place_of(keys: Sequence[Any]) -> str:
    """Where a value is, such as candidates[3].x."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{printable(key[:100])}" for key in keys).lstrip(".")
