"""A server from its settings to its end: socket, package, signals, a line of totals a minute."""

import asyncio
import logging
import socket
import time
from typing import Any

import uvicorn

from features.errors import UserError, one_line
from pipeline.serving.http.app import Service, create_app
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages

REPORT_S = 60.0
SPARE = (
    256  # connections beyond max_connections, which refuses scores: probes and those that ask for figures get theirs
)
KEEP_ALIVE_S = 75  # of an idle connection: more than the minute that proxies keep theirs, or they would use closed ones

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's, which after a first SIGTERM or SIGINT answers on for `drain_s` with /healthz 503, and after a second ends.

    Attributes:
        silent: connections that have not sent the head of a request, and since when: uvicorn waits for them without an end.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self.service, self.drain_s = service, drain_s
        self.end_at: float | None = None
        self.silent: dict[Any, float] = {}
        service.connections = lambda: len(self.server_state.connections)

    def handle_exit(self, *_: object) -> None:
        """What a signal does."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        else:
            self.service.draining = True
            self.end_at = time.monotonic() + self.drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        host, port = (sockets or self.servers[0].sockets)[0].getsockname()[:2]
        logger.info("listens on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns whether to end."""
        if self.end_at is not None and time.monotonic() >= self.end_at:
            self.should_exit = True
        self.end_silent(time.monotonic())
        return await super().on_tick(counter)

    def end_silent(self, now: float) -> None:
        """Closes the connections that take longer than `timeout_s` for the head of a request."""
        self.silent = {
            connection: self.silent.get(connection, now)
            for connection in self.server_state.connections
            if awaits_head(connection)
        }
        for connection, since in self.silent.items():
            if now - since > self.service.settings.timeout_s:
                connection.transport.abort()


def awaits_head(connection: Any) -> bool:
    """Whether a connection of uvicorn has neither a request nor its timer of idle ones, which starts after an answer."""
    cycle = connection.cycle
    return cycle is None or (cycle.response_complete and connection.timeout_keep_alive_task is None)


def bind(settings: ServeConfig) -> socket.socket:
    """The socket, which does not listen yet: nobody connects before a package is loaded. Raises UserError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off, which would delay each answer by 40 ms, only where the protocol is given.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((settings.host, settings.port))
    except (OSError, UnicodeError) as error:
        bound.close()
        raise UserError(
            f"port={settings.port} of host={settings.host} cannot be listened on: {one_line(error)}. Choose another, or end "
            "what has it."
        ) from None
    return bound


def server_of(service: Service) -> Server:
    """The server of a service, which runs in its `serve`."""
    settings = service.settings
    config = uvicorn.Config(
        create_app(service), log_config=None, access_log=False, ws="none", lifespan="on", server_header=False,
        limit_concurrency=settings.max_connections + SPARE, timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.end_s)),
    )  # fmt: skip
    return Server(config, service, settings.drain_s)


def serve(settings: ServeConfig) -> None:
    """Serves until a signal ends it. Raises UserError where it cannot begin, or was ended with requests in flight."""
    bound = bind(settings)
    metrics = Metrics()
    try:
        packages = Packages(settings, metrics)
        packages.start()
    except BaseException:
        bound.close()
        raise
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a warning for each malformed request would fill a disk
    service = Service(packages, settings, metrics)
    server = server_of(service)
    try:
        asyncio.run(run(server, bound, metrics))
    finally:
        packages.close()
    if server.force_exit or service.cut:
        why = "by a second signal" if server.force_exit else f"after end_s={settings.end_s:g} s"
        raise UserError(f"ended {why}: requests in flight have no answer")
    logger.info("ended: every request in flight was answered")


async def run(server: Server, bound: socket.socket, metrics: Metrics) -> None:
    """The server, and its line of totals."""
    report = asyncio.create_task(report_totals(metrics))
    try:
        await server.serve([bound])
    finally:
        report.cancel()


async def report_totals(metrics: Metrics) -> None:
    """A line a minute in which there were requests."""
    earlier: dict[str, float] = {}
    while True:
        await asyncio.sleep(REPORT_S)
        now = totals(metrics)
        if now != earlier:
            counts = {status: int(count - earlier.get(status, 0)) for status, count in sorted(now.items())}
            logger.info(
                "answers of the last %.0f s: %s", REPORT_S, ", ".join(f"{s} x {n:,}" for s, n in counts.items() if n)
            )
        earlier = now


def totals(metrics: Metrics) -> dict[str, float]:
    """Answers of /score by status."""
    found: dict[str, float] = {}
    for metric in metrics.requests.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total") and sample.labels["path"] == "/score":
                found[sample.labels["status"]] = sample.value
    return found
