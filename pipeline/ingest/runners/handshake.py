"""How a job and a worker pool recognise each other before either unpickles anything: JSON lines and a shared secret.

    pool  {"nonce"}                     of 32 random bytes
    job   {"nonce", "proof", "files"}   proof: that it has the secret;  files: what workers must see, as [path, bytes or null]
    pool  {"proof", "versions"}         or {"refused": why}

What follows on the same connection is that of pipeline.ingest.workers: pickled work, and reports. Nothing is encrypted.
"""

import hashlib
import hmac
import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from features.errors import UserError

KEY_VARIABLE = "TASKFUSE_POOL_KEY"
SECONDS = 10.0  # for the whole exchange
MAX_BYTES = 1 << 16  # of a line
LIBRARIES = ("numpy", "polars", "pyarrow")  # on which the bytes of a dataset depend
ROOT = Path(__file__).parents[3]
# Until a side is given up whose host is gone without a word: probes of an idle connection, and of one with unread data.
SILENCE_MS, PROBE_S = 15_000, 5


class HandshakeError(Exception):
    """The other side is not what it should be, with what the user should know."""


def key_of_environment() -> bytes:
    """The shared secret; empty where there is none."""
    return os.environ.get(KEY_VARIABLE, "").encode()


def versions() -> dict[str, str]:
    """What must be the same on all hosts. Raises UserError for a library that is not installed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed for this python: install taskfuse[ingest] for it") from None
    return found | {"taskfuse": code_digest()}


def code_digest() -> str:
    """Of the sources that workers run: messages are pickled, so both sides need the same ones."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("features", "pipeline") for path in (ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def notice_silence(connection: socket.socket) -> None:
    """Has the system end a connection when the other host is gone without closing it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("KEEPIDLE", PROBE_S), ("KEEPINTVL", PROBE_S), ("KEEPCNT", 2), ("USER_TIMEOUT", SILENCE_MS)):
        if option := getattr(socket, f"TCP_{name}", None):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def greet_pool(
    connection: socket.socket,
    key: bytes,
    own: dict[str, str],
    files: Sequence[tuple[str, int | None]],
    seconds: float = SECONDS,
) -> None:
    """The job's side.

    Raises:
        HandshakeError: the other side is no pool, has another secret or other versions, or does not see the files.
        OSError: it does not answer.
    """
    deadline, mine = time.monotonic() + seconds, secrets.token_hex(32)
    theirs = _text(_receive(connection, deadline), "nonce")
    _send(connection, {"nonce": mine, "proof": proof(key, "job", theirs, mine), "files": list(files)})
    answer = _receive(connection, deadline)
    if "refused" in answer:
        raise HandshakeError(_text(answer, "refused"))
    if not hmac.compare_digest(_text(answer, "proof"), proof(key, "pool", theirs, mine)):
        raise HandshakeError(f"has another {KEY_VARIABLE}")
    connection.settimeout(None)
    _check_versions(answer.get("versions"), own)


def greet_job(connection: socket.socket, key: bytes, own: dict[str, str], seconds: float = SECONDS) -> None:
    """The pool's side. Raises HandshakeError and OSError, as greet_pool."""
    deadline, mine = time.monotonic() + seconds, secrets.token_hex(32)
    _send(connection, {"nonce": mine})
    asked = _receive(connection, deadline)
    theirs = _text(asked, "nonce")
    refused = None
    if not hmac.compare_digest(_text(asked, "proof"), proof(key, "job", mine, theirs)):
        refused = f"has another {KEY_VARIABLE}"
    elif unseen := _unseen(asked.get("files")):
        refused = f"does not see {unseen}: give a URL, or an absolute path on a file system that all hosts mount"
    if refused:
        _send(connection, {"refused": refused})
        raise HandshakeError(refused)
    _send(connection, {"proof": proof(key, "pool", mine, theirs), "versions": own})
    connection.settimeout(None)


def _check_versions(theirs: Any, own: dict[str, str]) -> None:
    if not isinstance(theirs, dict):
        raise HandshakeError("is no worker pool of taskfuse")
    other = [name for name in own if theirs.get(name) != own[name]]
    if other:
        faults = ", ".join(f"{name} {str(theirs.get(name))[:40]} (here {own[name]})" for name in other)
        raise HandshakeError(f"has {faults}: install the same as where the job runs")


def _unseen(files: Any) -> str | None:
    """The first path that is not here, or has another size."""
    for path, size in files or ():
        try:
            seen = size in (None, Path(path).stat().st_size)
        except (OSError, ValueError):
            seen = False
        if not seen:
            return str(path)
    return None


def proof(key: bytes, side: str, nonce_of_pool: str, nonce_of_job: str) -> str:
    """That a side has the secret, for this exchange."""
    return hmac.new(key, f"taskfuse {side} {nonce_of_pool} {nonce_of_job}".encode(), "sha256").hexdigest()


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, deadline: float) -> dict[str, Any]:
    """The next line. Raises HandshakeError for anything else, OSError where it does not come in time."""
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("does not answer")
        connection.settimeout(left)
        try:
            received = connection.recv(4096)
        except TimeoutError:
            raise TimeoutError("does not answer") from None
        if not received:
            raise ConnectionResetError("closed the connection")
        line += received
        if len(line) > MAX_BYTES:
            raise HandshakeError("is no worker pool of taskfuse")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise HandshakeError("is no worker pool of taskfuse") from None
    if not isinstance(message, dict):
        raise HandshakeError("is no worker pool of taskfuse")
    return message


def _text(message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not value.isascii() or len(value) > MAX_BYTES:
        raise HandshakeError("is no worker pool of taskfuse")
    return value
