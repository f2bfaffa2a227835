"""The outcome of a night for machines: webhook, termination message. The webhook's URL is a secret."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from features.errors import UserError
from pipeline.release import outcome, webhook
from pipeline.release.config import NightlyConfig
from pipeline.release.outcome import announce, error_message, pager_text
from pipeline.release.webhook import post, webhook_url

MESSAGE: dict[str, Any] = {
    "date": "2026-11-09",
    "outcome": "fail",
    "exit_code": 2,
    "why": "fail: 1 of 2",
    "record": "/r",
}


class Server(HTTPServer):
    """Answers with the statuses of `answers`, the last one for good, and keeps what it was sent."""

    answers: list[int]
    received: list[tuple[str, str | None, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
        status = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("no header\r\nX", "")  # of which urllib3 warns, with the URL
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(webhook, "WAITS_S", (0.01, 0.01))
    server = Server(("127.0.0.1", 0), Handler)
    server.answers, server.received = [200], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/services/s3cret"


@pytest.mark.parametrize(
    ("answers", "delivered", "attempts"),
    [([200], True, 1), ([503, 429, 204], True, 3), ([500], False, 3), ([404], False, 1), ([302], False, 1)],
)
def test_a_message_is_posted_again_after_a_failure_that_may_pass(server, caplog, answers, delivered, attempts):
    caplog.set_level(logging.DEBUG)  # as by hydra.verbose=true
    caplog.set_level(logging.DEBUG, "urllib3.connectionpool")
    server.answers = answers
    assert post(url(server), MESSAGE) == delivered
    assert server.received == [("/services/s3cret", "application/json", MESSAGE)] * attempts
    assert "s3cret" not in caplog.text
    assert not logging.getLogger("urllib3.connectionpool").disabled  # afterwards
    assert ("was not delivered" in caplog.text) != delivered


def test_an_answer_whose_body_never_ends_is_not_waited_for():
    ended = threading.Event()

    class Endless(Handler):
        def do_POST(self) -> None:
            super().do_POST()
            with suppress(OSError):
                while not ended.wait(0.02):
                    self.wfile.write(b".")

    server = Server(("127.0.0.1", 0), Endless)
    server.answers, server.received = [200], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    guard = threading.Timer(5, ended.set)
    guard.start()
    assert post(url(server), MESSAGE)
    assert not ended.is_set()
    guard.cancel()
    ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_nobody_who_listens_is_a_warning_that_does_not_name_the_url(monkeypatch, caplog):
    monkeypatch.setattr(webhook, "WAITS_S", (0.01,))
    assert not post("http://127.0.0.1:1/s3cret", MESSAGE)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["webhook: the outcome was not delivered (NewConnectionError)"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "is not set"), ("", "is not set"), ("http://example.com/s3cret", "is no https: URL"),
        ("ftp://127.0.0.1/s3cret", "is no https: URL"), ("s3cret", "is no https: URL"), ("http://[s3cret", "is no URL"),
        ("http://127.0.0.1.example.com/s3cret", "is no https: URL"), ("https:///s3cret", "is no https: URL"),
    ],
)  # fmt: skip
def test_a_url_that_would_send_the_outcome_in_clear_is_refused_without_being_named(monkeypatch, given, words):
    monkeypatch.delenv(webhook.VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(webhook.VARIABLE, given)
    with pytest.raises(UserError, match=words) as caught:
        webhook_url()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("given", ["https://example.com/s3cret", "http://localhost:80/x", "http://[::1]:80/x"])
def test_https_and_this_machine_are_allowed(monkeypatch, given):
    monkeypatch.setenv(webhook.VARIABLE, given)
    assert webhook_url() == given


def config(tmp_path: Path, **settings: Any) -> NightlyConfig:
    return NightlyConfig(run="r", input="i", out=tmp_path, date="2026-11-09", **settings)


def test_a_pager_gets_a_few_lines_of_4_kib_at_most(tmp_path):
    file = tmp_path / "message"
    file.write_text("x" * 9000)  # an earlier, longer one goes
    settings = config(tmp_path, termination_message=file)
    full = MESSAGE | {
        "not_passed": ["fail: click ne\x1b[2J"],
        "alarms": ["decays"],
        "data": ["rows"],
        "blessed": "moved",
    }
    announce(settings, full, None)
    assert file.read_text() == (
        "night 2026-11-09: fail: 1 of 2\nfail: click ne\\x1b[2J\ndata: rows\nalarm: decays\nserving pointer: moved\n/r"
    )
    long = pager_text(MESSAGE | {"not_passed": ["ä" * 3000] * 2})
    assert 4090 < len(long.encode()) <= 4096


def test_the_message_of_an_error_is_one_line_with_its_reason(tmp_path):
    message = error_message(config(tmp_path), UserError("no\nsuch\x1b run"))
    assert message["why"] == "error: no such\\x1b run"
    assert (message["outcome"], message["exit_code"]) == ("error", 1)
    assert pager_text(message).splitlines()[0] == "night 2026-11-09: error: no such\\x1b run"


def test_a_message_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    announce(config(tmp_path, termination_message=tmp_path / "link"), MESSAGE, None)
    announce(config(tmp_path, termination_message=tmp_path / "no" / "folder"), MESSAGE, None)
    assert len(caplog.records) == 2
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(outcome, "TERMINATION_LOG", tmp_path / "log")
    announce(config(tmp_path), MESSAGE, None)
    assert not (tmp_path / "log").exists()  # it is no pod
    (tmp_path / "log").touch()
    announce(config(tmp_path), MESSAGE, None)
    assert (tmp_path / "log").read_text().startswith("night 2026-11-09")
