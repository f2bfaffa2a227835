"""The server as a process: its port, a drain on SIGTERM, an end on a second one."""

import asyncio
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from test_packages import write_package

from features.errors import UserError
from pipeline.serving.http.app import Service
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages
from pipeline.serving.http.server import Server, bind

BODY = json.dumps({"candidates": [{"x": 1.0}]})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    script = Path(__file__).parent / "serve_fake.py"
    folder = write_package(tmp_path / "p", 1)
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = ""
    while "listens on" not in line:
        line = process.stderr.readline()
        assert line, "it ended"
    yield process, int(re.findall(r"listens on http://127\.0\.0\.1:(\d+)", line)[0])
    process.kill()
    process.wait()


def get(port: int, method: str, path: str, body: str | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {"content-type": "application/json"})
    return connection.getresponse().status


def posted(port: int) -> tuple[threading.Thread, list[int | str]]:
    """A request that another thread waits for."""
    found: list[int | str] = []

    def ask() -> None:
        try:
            found.append(get(port, "POST", "/score", BODY))
        except (OSError, http.client.HTTPException) as error:
            found.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, found


@pytest.mark.system
def test_sigterm_answers_what_is_in_flight_and_ends_with_0(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    assert get(port, "GET", "/healthz") == 200
    first, of_first = posted(port)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert get(port, "GET", "/healthz") == 503
    time.sleep(0.5)
    second, of_second = posted(port)  # within drain_s; its answer comes after it
    for thread in (first, second):
        thread.join(10)
    assert (of_first, of_second) == ([200], [200])
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
        bind(ServeConfig(package=Path("p"), port=port, reuse_port=True)).close()
        with pytest.raises(UserError):
            bind(ServeConfig(package=Path("p"), port=port))
