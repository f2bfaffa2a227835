"""The server's routes in this process, on a package whose scores are known."""

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgi import Reply, call, post, running
from fake_package import FakeRequests, FakeTables, click, fake
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from features.errors import UserError
from pipeline.serving.http.app import Service, create_app
from pipeline.serving.http.body import asked, parsed_bytes
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages

ROWS = {"candidates": [{"x": 1.0}, {"x": -2.0}]}


def service_of(**options: Any) -> Service:
    metrics = Metrics()
    config = ServeConfig(package="unused", **options)
    packages = Packages(config, metrics)
    packages.take_over(fake(1))
    return Service(packages, config, metrics)


def answers(asked: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
    """What a coroutine of a running application returns."""

    async def run() -> Any:
        app = create_app(service_of(**options))
        async with running(app):
            return await asked(app)

    return asyncio.run(run())


def one(content: Any, **options: Any) -> Reply:
    return answers(lambda app: post(app, content), **options)


def test_scores_of_candidates_with_what_their_user_shares_and_whose_they_are() -> None:
    found = one({"user": {"u": 0.5}, "candidates": [{"x": 1.0}, {"x": -2.0}]})
    assert found.status == 200
    assert found.json["scores"]["click"] == pytest.approx([click(1, 1.5), click(1, -1.5)], abs=1e-6)
    assert found.json["scores"]["price"] == [15, -15]
    package = fake(1).scorer.manifest.checksum
    assert found.json["model"] == {"run": "run", "step": 1, "checkpoint": "checkpoint-1", "package": package}
    assert one({"candidates": []}).json["scores"] == {"click": [], "price": []}


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        (b"", 400, "no JSON"),
        (b'{"candidates": [', 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 422, "nested too deep"),
        (
            b'{"candidates": ["\\ud800", ' + b"[" * 900 + b"1e999" + b"]" * 900 + b"]}",
            422,
            "[0]: inf is not a finite number",
        ),
        (
            b'{"candidates": [{"x": [[1], [0, -NaN, 1e999]]}]}'.replace(b"-", b""),
            422,
            "candidates[0].x[1][1]: nan is not",
        ),
        (
            b'{"candidates": [{"x": 9223372036854775808, "u": NaN}]}',
            422,
            "candidates[0].x: the number has more than 64 bits",
        ),
        (b'{"candidates": [{"x": ' + b"[" * 500 + b"]" * 500 + b"}]}", 422, "nested too deep"),
        (b'{"candidates": [{"x": 1}, {"x": NaN}]}', 422, "candidates[1].x: nan is not a finite number"),
        (b'{"user": {"u": -Infinity}, "candidates": []}', 422, "user.u: -inf is not a finite number"),
        ([1], 422, "not an object"),
        ({}, 422, "candidates: is missing"),
        ({"candidates": {}}, 422, "candidates: is not a list"),
        ({"candidates": [{}, 3]}, 422, "candidates[1]: is not an object"),
        ({"candidates": [{}], "user": []}, 422, "user: is not an object"),
        ({"candidates": [], "usr": {}}, 422, "usr: unknown key, allowed are user, candidates"),
        ({"candidates": [{}, {}, {}, {"x": "a"}]}, 422, "candidates[3].x: 'a' is not a number"),
        ({"candidates": [{}] * 9}, 422, "candidates: 9 rows, more than 8 (max_rows)"),
    ],
)
def test_bad_bodies_get_a_status_and_the_place(content: Any, status: int, error: str) -> None:
    found = one(content, max_rows=8)
    assert (found.status, found.headers["content-type"]) == (status, "application/json")
    assert error in found.json["error"]
    assert "Traceback" not in found.json["error"]


def test_other_paths_methods_and_types() -> None:
    async def asked(app: Any) -> list[int]:
        assert (await call(app, "HEAD", "/healthz")).status == 200
        found = [
            await call(app, "GET", "/scores"),
            await call(app, "POST", "/score/"),
            await call(app, "GET", "/score"),
        ]
        found += [await post(app, ROWS, content_type="text/csv"), await post(app, ROWS, content_encoding="gzip")]
        assert all("error" in reply.json for reply in found)
        return [reply.status for reply in found]

    assert answers(asked) == [404, 404, 405, 415, 415]


def test_a_body_is_refused_while_it_is_read_and_what_it_held_is_given_back() -> None:
    async def asked(app: Any) -> None:
        parts = [b"x" * 60, b"x" * 60, b"never read"]
        assert (await call(app, "POST", "/score", parts)).status == 413
        assert (await call(app, "POST", "/score", [b"{}"], {"content-length": "101"})).status == 413
        assert b"taskfuse_serve_buffered_bytes 0.0" in (await call(app, "GET", "/metrics")).body
        assert (await call(app, "POST", "/score", [b'{"candidates": '], stalls=True)).status == 408

    answers(asked, max_body_bytes=100, timeout_s=0.05)


class Held:
    """A service whose scoring waits until it is let go."""

    def __init__(self, **options: Any) -> None:
        self.service, self.go, self.batches = service_of(**options), threading.Event(), list[int]()
        scorer = self.service.packages.serving().scorer
        program = scorer.program

        def waits(embedding_BE: Any, x_B1: Any) -> Any:
            self.batches.append(len(x_B1))
            assert self.go.wait(20)
            return program(embedding_BE, x_B1)

        object.__setattr__(scorer, "program", waits)


async def until(reached: Callable[[], bool]) -> None:
    for _ in range(2000):
        if reached():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("not reached")


VALUES = (b"[]", b"{}", b"1.5", b"-1", b'{"x":1}', b'"ab"', b"[1]", b'{"a":{}}', b'"' + b"a" * 40 + b'\\u4e00"')


def test_what_a_body_is_parsed_to_takes_no_more_than_is_counted_and_one_that_takes_too_much_is_refused() -> None:
    for value in VALUES:
        body = b'{"candidates": [' + b",".join([value] * 5000) + b"]}"
        tracemalloc.start()
        content = from_json(body, cache_strings="keys")
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(content["candidates"]) == 5000
        assert taken < parsed_bytes(body), value
    reply = one(b'{"candidates": [' + b",".join([b"[]"] * 5000) + b"]}", max_buffered_bytes=200_000)
    assert (reply.status, "max_buffered_bytes" in reply.json["error"]) == (413, True)


def test_what_is_held_is_bounded_over_all_requests_and_large_bodies_are_parsed_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, threads = Held(max_buffered_bytes=3_000_000), list[bool]()

    def parse(*given: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return asked(*given)

    monkeypatch.setattr("pipeline.serving.http.app.asked", parse)

    async def run() -> list[Reply]:
        async with running(app := create_app(held.service)):
            small = [asyncio.create_task(post(app, ROWS))]
            await until(lambda: held.batches == [2])
            large = [asyncio.create_task(post(app, {"candidates": [{"x": 1.23456789}] * 4000})) for _ in range(3)]
            await until(lambda: len(held.service.batcher.queue) == 2 and large[2].done())  # type: ignore[union-attr]
            held.go.set()
            return await asyncio.gather(*small, *large)

    found = asyncio.run(run())
    assert [reply.status for reply in found] == [200, 200, 200, 503]
    assert found[3].headers["retry-after"] == "1"
    assert threads == [True, False, False]
    assert held.service.metrics.held == 0


def test_a_defect_is_the_answer_of_the_request_that_has_it_and_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FakeRequests.encode

    def fails(self: Any, rows: Any, user: Any, where: str) -> Any:
        if rows[0].get("x") == 666:
            raise OverflowError("of ours")
        return encode(self, rows, user, where)

    monkeypatch.setattr(FakeRequests, "encode", fails)

    async def asked(app: Any) -> tuple[list[Reply], bytes]:
        contents = [{"candidates": [{"x": x}]} for x in (1, 666, "bad", 666, 2)]
        found = await asyncio.gather(*(post(app, content) for content in contents))
        return found, (await call(app, "GET", "/metrics")).body

    found, figures = answers(asked, batch_wait_ms=50.0)
    assert [reply.status for reply in found] == [200, 500, 422, 500, 200]
    assert "of ours" not in found[1].json["error"]
    assert b'taskfuse_serve_requests_total{path="/score",status="500"} 2.0' in figures
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_package_that_does_not_fit_together_is_no_error_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise UserError("ids beyond the table")

    monkeypatch.setattr(FakeTables, "embed", fails)

    async def asked(app: Any) -> list[Reply]:
        return await asyncio.gather(post(app, ROWS), post(app, {"candidates": [{"x": "bad"}]}))

    assert [reply.status for reply in answers(asked, batch_wait_ms=50.0)] == [500, 422]


def test_requests_that_wait_are_scored_at_once_and_each_gets_its_own_rows() -> None:
    held = Held(max_batch_rows=6)

    async def run() -> list[Reply]:
        async with running(app := create_app(held.service)):
            contents = [{"user": {"u": n}, "candidates": [{"x": n + k} for k in range(3)]} for n in range(4)]
            contents[2]["candidates"][1]["x"] = "bad"
            tasks = [asyncio.create_task(post(app, contents[0]))]
            await until(lambda: held.batches == [3])
            tasks += [asyncio.create_task(post(app, content)) for content in contents[1:]]
            await until(lambda: len(held.service.batcher.queue) == 3)  # type: ignore[union-attr]
            held.go.set()
            return await asyncio.gather(*tasks)

    found = asyncio.run(run())
    assert [reply.status for reply in found] == [200, 200, 422, 200]
    assert found[2].json["error"] == "candidates[1].x: 'bad' is not a number"
    for n in (0, 1, 3):
        assert found[n].json["scores"]["price"] == [10 * (2 * n + k) for k in range(3)]
    assert held.batches == [3, 3, 3]  # the first alone; then six rows, three of them refused; then the last


def test_a_full_queue_and_a_slow_answer_are_503_and_504() -> None:
    held = Held(max_waiting=1, timeout_s=0.2)
    metrics = held.service.metrics

    async def run() -> list[Reply]:
        async with running(app := create_app(held.service)):
            first = asyncio.create_task(post(app, ROWS))
            await until(lambda: held.batches == [2])
            rest = [asyncio.create_task(post(app, ROWS)) for _ in range(2)]
            found = await asyncio.gather(first, *rest)
            assert held.service.batcher is not None
            assert not held.service.batcher.queue, "a request that nobody waits for"
            body = json.dumps(ROWS).encode()
            assert metrics.held == len(body) + parsed_bytes(body), "the rows that are being scored are still there"
            held.go.set()
            await until(lambda: metrics.held == 0)
            return found

    first, second, third = asyncio.run(run())
    assert (first.status, second.status, third.status) == (504, 504, 503)
    assert third.headers["retry-after"] == "1"
    assert held.batches == [2]  # what has timed out is not scored any more


def test_health_identity_metrics_and_draining() -> None:
    service = service_of()

    async def run() -> None:
        async with running(app := create_app(service)):
            await post(app, ROWS)
            await post(app, b"{")
            assert (await call(app, "GET", "/healthz")).json["model"]["step"] == 1
            assert (await call(app, "GET", "/model")).json["tasks"] == {"click": "binary", "price": "regression"}
            text = (await call(app, "GET", "/metrics")).body.decode()
            assert 'taskfuse_serve_requests_total{path="/score",status="400"} 1.0' in text
            assert 'taskfuse_serve_requests_total{path="/score",status="200"} 1.0' in text
            assert "taskfuse_serve_rows_total 2.0" in text
            assert "taskfuse_serve_model_step 1.0" in text
            service.draining = True
            assert (await call(app, "GET", "/healthz")).status == 503
            assert (await post(app, ROWS)).status == 200

    asyncio.run(run())


def test_the_description_has_the_columns_of_a_row_and_its_page_loads_nothing() -> None:
    async def asked(app: Any) -> tuple[Reply, Reply]:
        return await call(app, "GET", "/openapi.json"), await call(app, "GET", "/docs")

    openapi, docs = answers(asked)
    assert openapi.json["openapi"].startswith("3.1")
    kinds = openapi.json["components"]["schemas"]
    assert kinds["Row"]["properties"]["x"]["type"] == "number"
    assert kinds["Answer"]["properties"]["scores"]["properties"]["click"]["items"] == {"type": ["number", "null"]}
    assert "<td><code>x</code></td><td>number</td>" in docs.body.decode()
    body = openapi.json["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Request"}
    assert "&lt;the x&gt;" in docs.body.decode()
    assert [part for part in ("<script", "<link", "src=", "http://", "https://") if part in docs.body.decode()] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "u", "user", "candidates", "\ud800"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(
        st.one_of(st.binary(max_size=30), JSON.map(lambda value: json.dumps(value).encode())), min_size=20, max_size=20
    )
)
@settings(max_examples=15, deadline=None)
def test_no_body_is_a_defect_of_the_server(bodies: list[bytes]) -> None:
    async def asked(app: Any) -> list[Reply]:
        return await asyncio.gather(*(post(app, body) for body in bodies))

    assert {reply.status for reply in answers(asked)} <= {200, 400, 422}
