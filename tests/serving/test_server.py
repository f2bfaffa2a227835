"""The server as a process: its port, a drain on SIGTERM, an end on a second one."""

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from features.errors import UserError
from pipeline.serving.http.app import Service
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages
from pipeline.serving.http.server import Server, bind

BODY = json.dumps({"candidates": [{"city": "rome"}]}).encode()
HEADERS = {"content-type": "application/json", "content-length": str(len(BODY))}


@pytest.fixture
def server(package: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "jobs.serve", f"package={package}", "port=0", "drain_s=0.5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = ""
    while "listens on" not in line:
        line = process.stderr.readline()
        assert line, "it ended"
    yield process, int(re.findall(r"listens on http://127\.0\.0\.1:(\d+)", line)[0])
    process.kill()
    process.wait()
    process.stderr.close()


def connection(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=10)


def answer(port: int, method: str, path: str) -> int:
    asked = connection(port)
    asked.request(method, path, BODY if method == "POST" else None, HEADERS if method == "POST" else {})
    return asked.getresponse().status


@pytest.mark.system
def test_sigterm_answers_what_is_in_flight_and_ends_with_0(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    assert (answer(port, "GET", "/healthz"), answer(port, "POST", "/score")) == (200, 200)
    slow = connection(port)
    slow.putrequest("POST", "/score")
    for name, value in HEADERS.items():
        slow.putheader(name, value)
    slow.endheaders(BODY[:10])
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert (answer(port, "GET", "/healthz"), answer(port, "POST", "/score")) == (503, 200)
    time.sleep(1)
    with pytest.raises(OSError):
        answer(port, "GET", "/healthz")
    slow.send(BODY[10:])
    assert slow.getresponse().status == 200
    assert process.wait(10) == 0
    assert process.stderr
    text = process.stderr.read()
    assert "every request in flight was answered" in text
    assert "Traceback" not in text


def test_a_second_signal_ends_at_once() -> None:
    config = ServeConfig(package=Path("p"))
    metrics = Metrics()
    server = Server(uvicorn.Config(None), Service(Packages(config, metrics), config, metrics), drain_s=100)  # type: ignore[arg-type]
    server.handle_exit(signal.SIGTERM, None)
    assert (server.service.draining, asyncio.run(server.on_tick(1)), server.force_exit) == (True, False, False)
    server.handle_exit(signal.SIGTERM, None)
    assert (asyncio.run(server.on_tick(1)), server.force_exit) == (True, True)


def test_a_port_that_is_taken_is_an_error_of_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port={port} of host=127.0.0.1 cannot be listened on"):
            bind(ServeConfig(package=Path("p"), port=port))
    with pytest.raises(UserError, match="cannot be listened on"):
        bind(ServeConfig(package=Path("p"), host="no such host", port=0))


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="the system cannot share ports")
def test_servers_that_agree_share_a_port() -> None:
    with bind(ServeConfig(package=Path("p"), port=0, reuse_port=True)) as first:
        port = first.getsockname()[1]
        first.listen()
        assert first.proto == socket.IPPROTO_TCP, "asyncio leaves Nagle's algorithm on: 40 ms for each answer"
        bind(ServeConfig(package=Path("p"), port=port, reuse_port=True)).close()
        with pytest.raises(UserError):
            bind(ServeConfig(package=Path("p"), port=port))
