"""Requests to an application in this process, as a server of ASGI makes them: no socket, no client library."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@asynccontextmanager
async def running(app: Any) -> AsyncIterator[None]:
    """The application between its startup and its shutdown."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan", "state": {}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    yield
    await inbox.put({"type": "lifespan.shutdown"})
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
    await task


async def call(
    app: Any,
    method: str,
    path: str,
    parts: list[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    stalls: bool = False,
) -> Reply:
    """One request, whose body arrives in parts. stalls: the last of them is not its end, and no more arrives."""
    sent: list[dict[str, Any]] = []
    waiting = [*(parts or [b""])]

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.sleep(60)  # the client stalls, or waits for the answer
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting) or stalls}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"content-type": "application/json"} | dict(headers or {})
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], found, b"".join(message.get("body", b"") for message in rest))


async def post(app: Any, content: Any, **headers: str) -> Reply:
    """A request for scores: content as JSON, or bytes as they are."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return await call(app, "POST", "/score", [body], {name.replace("_", "-"): value for name, value in headers.items()})
