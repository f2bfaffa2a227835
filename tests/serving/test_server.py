"""The server as a process: its port, a drain on SIGTERM, an end on a second one."""

import asyncio
import gc
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import real_package
import uvicorn
from fake_package import fake
from real_package import expected

from features.errors import UserError
from pipeline.serving.http.app import Service
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages
from pipeline.serving.http.server import Server, bind, server_of

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


@contextmanager
def listening(packages: Packages) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    server = server_of(Service(packages, packages.settings, packages.metrics))
    with bind(ServeConfig(package=Path("p"), port=0)) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def received(asked: socket.socket) -> bytes:
    try:
        return asked.recv(1000)
    except ConnectionResetError:
        return b""


def test_connections_without_a_request_are_closed_and_leave_health_and_figures_alone() -> None:
    packages = Packages(ServeConfig(package=Path("p"), max_connections=4, timeout_s=0.4, end_s=1), Metrics())
    packages.take_over(fake(1))
    with listening(packages) as port, ExitStack() as opened:
        kept = connection(port)
        opened.callback(kept.close)
        silent = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(5)]
        silent[0].sendall(b"POST /score HTTP/1.1\r\nhost")
        halfway = connection(port)
        for each in (kept, halfway):
            each.request("GET", "/healthz")
            assert each.getresponse().read()
        halfway.sock.sendall(b"GET /hea")  # a second request, which does not go on
        silent.append(opened.enter_context(halfway.sock))
        refused = connection(port)
        refused.request("POST", "/score", BODY, HEADERS)
        reply = refused.getresponse()
        assert (reply.status, reply.getheader("retry-after"), reply.getheader("connection")) == (503, "1", "close")
        assert "max_connections" in json.loads(reply.read())["error"]
        assert [received(each) for each in silent] == [b""] * 6
        kept.request("GET", "/metrics")
        assert b'requests_total{path="/score",status="503"} 1.0' in kept.getresponse().read()
        assert answer(port, "POST", "/score") == 200


def test_a_burst_while_a_link_is_moved_gets_the_scores_of_the_package_that_each_answer_names(
    package: Path, tmp_path: Path
) -> None:
    real_package.write(tmp_path / "second", 2)
    link, row = tmp_path / "current", {"city": "rome", "recent": ["a", "c"], "age": 31}
    link.symlink_to(package)
    packages = Packages(ServeConfig(package=link, poll_s=3600, timeout_s=20), Metrics())
    packages.start()
    scorer = packages.serving().scorer
    vars(scorer.requests)["cycle"] = scorer  # as others in it that only a collection frees
    first = weakref.ref(scorer)
    del scorer
    body = json.dumps({"candidates": [row] * 3}).encode()
    replies: list[tuple[int, list[float]]] = []

    def ask(port: int) -> None:
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(6):
            asked.request("POST", "/score", body, {"content-type": "application/json"})
            found = json.loads(asked.getresponse().read())
            replies.append((found["model"]["step"], found["scores"]["spent"]))
        asked.close()

    with listening(packages) as port, ExitStack() as ended:
        gc.disable()  # a collection by chance would hide one that is missing
        ended.callback(gc.enable)
        askers = [threading.Thread(target=ask, args=(port,)) for _ in range(64)]
        for thread in askers[:32]:
            thread.start()
        (tmp_path / "next").symlink_to(tmp_path / "second")
        (tmp_path / "next").rename(link)
        packages.poll()
        for thread in askers[32:]:
            thread.start()
        for thread in askers:
            thread.join()
        packages.poll()
        assert first() is None, "the package that was replaced is still in memory"
    packages.close()
    assert len(replies) == 64 * 6
    assert {step for step, _ in replies} == {1, 2}
    for step, spent in replies:
        assert spent == pytest.approx([expected(row, step)[1]] * 3, rel=1e-5)


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
