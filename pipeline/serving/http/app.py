"""The routes: scores, health, metrics, the model's identity, and a description of them."""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.http.batching import Batcher
from pipeline.serving.http.body import RETRY, Asked, RefusedError, asked, read_body
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Held, Metrics
from pipeline.serving.http.packages import Loaded, Packages
from pipeline.serving.http.pages import page, schemas

SMALL = 64 << 10  # bytes of a body that is parsed at once, within a millisecond or so
PATHS = ("/score", "/healthz", "/metrics", "/model", "/openapi.json", "/docs")
BODIES = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}},
    },
    "responses": {
        "200": {
            "description": "Scores of each task, in the order of the candidates; null where a prediction is not finite.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}},
        }
    }
    | {
        status: {
            "description": why,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, why in {
            "400": "The body is no JSON.",
            "408": "The body did not arrive in time.",
            "413": "The body is too large.",
            "415": "The body is of another type.",
            "422": "A value is refused; its field is named.",
            "503": "Too many requests or connections, or the server ends: try again after Retry-After.",
            "504": "The scores took too long.",
        }.items()
    },
}

logger = logging.getLogger(__name__)


class Service:
    """What the routes answer.

    Attributes:
        draining: set once the server is to end: /healthz answers 503. cut: requests that were ended without an answer.
        connections: how many the server has.
    """

    def __init__(self, packages: Packages, settings: ServeConfig, metrics: Metrics) -> None:
        self.packages, self.settings, self.metrics = packages, settings, metrics
        self.draining, self.cut = False, 0
        self.batcher: Batcher | None = None
        self.connections: Callable[[], int] = lambda: 0

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Runs the threads that score."""
        settings = self.settings
        self.batcher = batcher = Batcher(
            self.packages.serving, settings.max_batch_rows, settings.batch_wait_ms / 1000, settings.max_waiting,
            settings.threads, self.metrics,
        )  # fmt: skip
        self.metrics.watch(lambda: len(batcher.queue))
        yield
        await asyncio.to_thread(batcher.close)

    async def score(self, request: Request) -> Response:
        """Scores of candidates."""
        started = time.perf_counter()
        try:
            return await self._score(request, time.monotonic() + self.settings.timeout_s)
        except asyncio.CancelledError:
            self.cut += 1
            raise
        finally:
            self.metrics.seconds.observe(time.perf_counter() - started)

    async def _score(self, request: Request, end: float) -> Response:
        assert self.batcher
        if self.connections() > self.settings.max_connections:
            raise RefusedError(
                503, "too many connections (max_connections): try again", RETRY | {"connection": "close"}
            )
        held = Held(self.metrics)
        try:
            rows, user = await self._asked(request, held)
        except BaseException:
            held.release()
            raise
        loaded, scores = await self.batcher.submit(rows, user, end - time.monotonic(), held.release)
        return answer(
            {"model": loaded.identity, "scores": {task: value_B.tolist() for task, value_B in scores.items()}}
        )

    async def _asked(self, request: Request, held: Held) -> Asked:
        settings = self.settings
        try:
            body = await asyncio.wait_for(read_body(request, settings, held), settings.timeout_s)
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {settings.timeout_s:g} s (timeout_s)") from None
        if len(body) <= SMALL:
            return asked(body, settings.max_rows)
        return await asyncio.to_thread(asked, body, settings.max_rows)  # others are answered meanwhile

    async def healthz(self) -> Response:
        """200 while it serves, with the model's identity."""
        if self.draining:
            raise RefusedError(503, "the server ends")
        return answer({"model": self.packages.serving().identity, "problem": self.packages.problem})

    async def model(self) -> Response:
        """The checkpoint, its metrics, and what the export measured."""
        loaded = self.packages.serving()
        parts = {"tasks", "format", "metrics", "tolerances", "versions"}
        return answer({"model": loaded.identity, **loaded.scorer.manifest.model_dump(mode="json", include=parts)})

    async def figures(self) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        """The description of these routes."""
        return answer(described(request.app, self.packages.serving()))

    async def docs(self, request: Request) -> Response:
        """The same as a page."""
        return Response(page(described(request.app, self.packages.serving())), media_type="text/html; charset=utf-8")


def create_app(service: Service) -> FastAPI:
    """The application. The packages of `service` are started by whoever runs it."""
    app = FastAPI(
        title="taskfuse", summary="Scores of a multi-task ranking model", lifespan=service.lifespan,
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.add_api_route("/score", service.score, methods=["POST"], openapi_extra=BODIES, response_model=None)
    app.add_api_route("/healthz", service.healthz, response_model=None)
    app.add_api_route("/healthz", service.healthz, methods=["HEAD"], include_in_schema=False, response_model=None)
    app.add_api_route("/model", service.model, response_model=None)
    app.add_api_route("/metrics", service.figures, response_model=None)
    app.add_api_route("/openapi.json", service.openapi, include_in_schema=False)
    app.add_api_route("/docs", service.docs, include_in_schema=False)
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_middleware(Counted, metrics=service.metrics)
    return app


def described(app: FastAPI, loaded: Loaded) -> dict[str, Any]:
    """OpenAPI of the routes, with a row as the package that serves takes it."""
    found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    found.setdefault("components", {})["schemas"] = schemas(loaded)
    return found


async def refused(_: Request, error: Any) -> Response:
    """The answer to a request that gets no scores."""
    return answer({"error": str(error)}, error.status, error.headers)


async def unknown(_: Request, error: Any) -> Response:
    """The answer to another path or method."""
    return answer({"error": f"{error.detail}: known are {', '.join(PATHS)}"}, error.status_code, error.headers)


def answer(content: Any, status: int = 200, headers: Any = None) -> Response:
    """A response of JSON; numbers that are not finite, which JSON does not have, are null."""
    return Response(to_json(content, inf_nan_mode="null"), status, headers, "application/json")


class Counted:
    """Counts answers by path and status. Where this program fails it answers 500, and logs the first error of a place.

    Attributes:
        seen: errors that were logged: their type and where they were raised.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.seen: set[tuple[type[Exception], str, int]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        path = scope.get("path") if scope.get("path") in PATHS else "other"

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception as error:
            self.log(error)
            if begun or scope["type"] != "http":
                raise
            await answer({"error": "a defect of the server, which its log has"}, 500)(scope, receive, counted)

    def log(self, error: Exception) -> None:
        """Logs an error with its traceback, unless there was one of its type at its place: requests must not fill a disk."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = (type(error), frame.filename, frame.lineno or 0)
        if place not in self.seen:
            self.seen.add(place)
            logger.error("a defect of the server; further ones of its kind are only counted", exc_info=error)
