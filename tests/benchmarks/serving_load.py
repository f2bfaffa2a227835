"""Requests to an HTTP server at once, timed one by one; the standard library alone.

    python tests/benchmarks/serving_load.py < PLAN

reads a plan as JSON (`Plan`), sends its requests in turn over connections that stay open, each the next one once it has its
answer, and prints what came back as JSON: answers by status, failures by kind, p50, p99 and the largest latency.
"""

import asyncio
import base64
import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0  # of one request


@dataclass(frozen=True)
class Plan:
    """What is sent.

    Attributes:
        requests: whole requests, head and body, base64. connections: at once.
        seconds: how long. count: at most so many; 0: no limit but the time.
    """

    port: int
    requests: list[str]
    connections: int
    seconds: float
    count: int = 0
    host: str = "127.0.0.1"


@dataclass
class Answers:
    """What came back. failures: connections that broke, and answers that are no HTTP, by kind."""

    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    sent: int = 0


def request(
    path: str, body: bytes, method: str = "POST", kind: str = "application/json", length: int | None = None
) -> str:
    """A request for a plan. length: what its header says, where that is not the truth."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    return base64.b64encode(head.encode() + body).decode()


def load(plan: Plan, core: int | None = None) -> dict[str, Any]:
    """Runs a plan in a process of its own, on one core, and returns what it prints."""
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    command = [*pinned, sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, input=json.dumps(asdict(plan)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("the load generator failed:\n" + "\n".join(done.stderr.splitlines()[-8:]))
    return json.loads(done.stdout)


async def drive(plan: Plan) -> Answers:
    """All connections at work until the time is up or every request has its answer."""
    answers, end = Answers(), time.perf_counter() + plan.seconds
    bodies = [base64.b64decode(text) for text in plan.requests]
    await asyncio.gather(*(_connection(plan, bodies, answers, end) for _ in range(plan.connections)))
    return answers


async def _connection(plan: Plan, bodies: list[bytes], answers: Answers, end: float) -> None:
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    while time.perf_counter() < end and (not plan.count or answers.sent < plan.count):
        body = bodies[answers.sent % len(bodies)]
        answers.sent += 1
        begin = time.perf_counter()
        try:
            if streams is None:
                streams = await asyncio.open_connection(plan.host, plan.port)
            status, stays = await asyncio.wait_for(_exchange(*streams, body), TIMEOUT_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
            answers.failures[type(error).__name__] += 1
            status, stays = 0, False
        if status:
            answers.statuses[status] += 1
            answers.latencies.append(time.perf_counter() - begin)
        if not stays and streams:
            streams[1].close()
            streams = None
    if streams:
        streams[1].close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bool]:
    """One request and its answer: the status, and whether the connection stays open."""
    writer.write(body)
    status, headers = await _head(reader)
    await reader.readexactly(int(headers.get("content-length", "0")))
    return status, headers.get("connection", "").lower() != "close"


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Raises ValueError or IncompleteReadError where this is no answer."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
    if "content-length" not in headers:
        raise ValueError("an answer without Content-Length")
    return int(first.split(" ")[1]), headers


def summary(answers: Answers, seconds: float) -> dict[str, Any]:
    """What is printed; latencies in ms."""
    ordered = sorted(answers.latencies) or [math.nan]
    return {
        "statuses": {str(status): count for status, count in sorted(answers.statuses.items())},
        "failures": dict(answers.failures),
        "seconds": seconds,
        "per_s": len(answers.latencies) / seconds,
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)],
        "max_ms": 1e3 * ordered[-1],
    }


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    begin = time.perf_counter()
    answers = asyncio.run(drive(plan))
    print(json.dumps(summary(answers, time.perf_counter() - begin)))


if __name__ == "__main__":
    main()
