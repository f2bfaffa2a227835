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
    found: a path without its query to what GET answers, an object or the text of a log; other paths are 404.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.seen: list[tuple[str, str, Any]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self.found: dict[str, dict[str, Any] | str] = {}


class FakeHandler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server = self.server
        assert isinstance(server, FakeServer)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        server.seen.append((self.command, unquote(self.path), body))
        self.reply(*self.content(server, body))

    def content(self, server: FakeServer, body: Any) -> tuple[int, dict[str, Any] | str]:
        if self.command == "GET":
            path = self.path.partition("?")[0]
            missing = {"kind": "Status", "message": f"{path.rpartition('/')[2]} not found", "code": 404}
            return (200, server.found[path]) if path in server.found else (404, missing)
        if self.command == "DELETE":
            return 200, {"kind": "Status"}
        if body["kind"] in server.refuse:
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

    do_GET = do_POST = do_DELETE = answer

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
