"""A Kubernetes API server for tests: it records what it is sent, and answers from a table, with events and logs that go on."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from kubernetes.config import kube_config

PODS = "/api/v1/namespaces/ml/pods"


class FakeServer(ThreadingHTTPServer):
    """seen: verb, path and body of each request. refuse: a kind of object to the code and message of its refusal.
    found: a path without its query to what GET answers, an object or the text of a log, or a list of them one after the
    other; other paths are 404. gone: paths whose DELETE is 404. lost: kinds that are created, but the answer is lost.
    failures: verb and path to codes that come first, with headers; DROPPED closes the connection instead. streams: a path to
    what the requests that watch or follow it get, one function after the other, which returns lines; they may wait.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.seen: list[tuple[str, str, Any]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.found: dict[str, Any] = {PODS: {"kind": "PodList", "items": []}}
        self.gone: set[str] = set()
        self.lost: set[str] = set()
        self.failures: dict[tuple[str, str], list[tuple[int, dict[str, str]]]] = {}
        self.streams: dict[str, list[Callable[[], Iterator[str]]]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves a stream is no fault."""


DROPPED = (0, {"": ""})


class FakeHandler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server = self.server
        assert isinstance(server, FakeServer)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        server.seen.append((self.command, unquote(self.path), body))
        parts = urlsplit(self.path)
        if failures := server.failures.get((self.command, parts.path)):
            code, headers = failures.pop(0)
            if (code, headers) == DROPPED:
                self.close_connection = True
                self.connection.close()
                return
            self.reply(code, {"kind": "Status", "message": f"failure {code}", "code": code}, headers)
            return
        if {"watch", "follow"} & parse_qs(parts.query).keys():
            self.stream(server, parts.path)
            return
        self.reply(*self.content(server, body))

    def stream(self, server: FakeServer, path: str) -> None:
        left = server.streams.get(path)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()  # without a length: it ends with the connection
        for line in left.pop(0)() if left else iter(()):
            self.wfile.write(f"{line}\n".encode())
            self.wfile.flush()
        if not left:
            time.sleep(0.05)

    def content(self, server: FakeServer, body: Any) -> tuple[int, dict[str, Any] | str]:
        path = self.path.partition("?")[0]
        missing = {"kind": "Status", "message": f"{path.rpartition('/')[2]} not found", "code": 404}
        if self.command == "GET":
            answer = server.found.get(path)
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            return (404, missing) if answer is None else (200, answer)
        if self.command == "DELETE":
            return (404, missing) if path in server.gone else (200, {"kind": "Status"})
        versioned = "kubeflow" in path or "poddisruptionbudgets" in path
        if self.command == "PUT" and versioned and "resourceVersion" not in body["metadata"]:
            message = (
                "metadata.resourceVersion: must be specified for an update"  # so it is for budgets and custom resources
            )
            return 422, {"kind": "Status", "message": message, "code": 422}
        if body["kind"] in server.lost:
            server.found[f"{path}/{body['metadata']['name']}"] = body
            return 504, {"kind": "Status", "message": "timeout", "code": 504}
        if self.command == "POST" and body["kind"] in server.refuse:
            code, message = server.refuse[body["kind"]]
            return code, {"kind": "Status", "message": message, "code": code}
        return 201, body

    def reply(self, code: int, content: dict[str, Any] | str, headers: dict[str, str] | None = None) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        yield fake
        fake.shutdown()


@contextmanager
def current_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server that the kubeconfig of this process, written into `folder`, points at."""
    with fake_server() as fake:
        config = write_kubeconfig(folder, fake.server_port)
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))  # read from KUBECONFIG on import
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield fake


def write_kubeconfig(folder: Path, port: int) -> Path:
    """A kubeconfig whose current context is the server on `port`, in namespace `ml`; there is another, `away`."""
    context = {"cluster": "c", "user": "u", "namespace": "ml"}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": context}, {"name": "away", "context": context | {"cluster": "d"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}},
            {"name": "d", "cluster": {"server": "http://127.0.0.1:1"}},
        ],
        "users": [{"name": "u", "user": {}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(content))
    return folder / "kubeconfig"
