"""A Kubernetes API server for tests: it records what it is sent, and answers from a table."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml


class FakeServer(ThreadingHTTPServer):
    """seen: verb, path and body of each request. refuse: a kind of object to the code and message of its refusal.
    found: a path without its query to what GET answers, an object or the text of a log, or a list of them one after the
    other; other paths are 404. gone: paths whose DELETE is 404. lost: kinds that are created, but the answer is lost.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.seen: list[tuple[str, str, Any]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.found: dict[str, Any] = {"/api/v1/namespaces/ml/pods": {"kind": "PodList", "items": []}}
        self.gone: set[str] = set()
        self.lost: set[str] = set()


class FakeHandler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server = self.server
        assert isinstance(server, FakeServer)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        server.seen.append((self.command, unquote(self.path), body))
        self.reply(*self.content(server, body))

    def content(self, server: FakeServer, body: Any) -> tuple[int, dict[str, Any] | str]:
        path = self.path.partition("?")[0]
        missing = {"kind": "Status", "message": f"{path.rpartition('/')[2]} not found", "code": 404}
        if self.command == "GET":
            answer = server.found.get(path)
            return (404, missing) if answer is None else (200, answer.pop(0) if isinstance(answer, list) else answer)
        if self.command == "DELETE":
            return (404, missing) if path in server.gone else (200, {"kind": "Status"})
        if body["kind"] in server.lost:
            server.found[f"{path}/{body['metadata']['name']}"] = body
            return 504, {"kind": "Status", "message": "timeout", "code": 504}
        if self.command == "POST" and body["kind"] in server.refuse:
            code, message = server.refuse[body["kind"]]
            return code, {"kind": "Status", "message": message, "code": code}
        return 201, body

    def reply(self, code: int, content: dict[str, Any] | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        yield fake
        fake.shutdown()


def write_kubeconfig(folder: Path, port: int) -> Path:
    """A kubeconfig whose current context is the server on `port`, in namespace `ml`."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "ml"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(content))
    return folder / "kubeconfig"
