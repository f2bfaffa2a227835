"""The benchmark of packages: its NE is that of the evaluator, its load counts every request, and its goals can fail."""

import asyncio

import numpy as np
import pytest
import serving
import serving_load
import torch

from pipeline.evaluation.metrics.accumulator import Metrics


def test_ne_by_its_definition_is_that_of_the_evaluator():
    draw = np.random.default_rng(0)
    label_NT = (draw.random((500, 2)) < [0.3, 0.05]).astype(np.float32)
    logit_NT = draw.normal(0, 2, (500, 2)) + 2 * label_NT - 3
    metrics = Metrics([("a", "binary"), ("b", "binary")])
    ones_BT = torch.ones(500, 2)
    metrics.update(torch.from_numpy(logit_NT), torch.from_numpy(label_NT), ones_BT.bool(), ones_BT)
    expected = [metrics.compute()[task]["ne"] for task in ("a", "b")]
    assert serving.entropy(logit_NT, label_NT) == pytest.approx(expected, rel=1e-6)


async def _drive(kinds: list[bytes], count: int) -> serving_load.Answers:
    """Sends requests to a server that does what their path says: answers with a status, or breaks the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            while (await reader.readline()).strip():
                pass
            await reader.readexactly(2)
            kind = head.split()[1][1:].decode()
            if kind == "break":
                break
            writer.write(f"HTTP/1.1 {kind} X\r\ncontent-length: 3\r\n\r\nabc".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    plan = serving_load.Plan(port, [serving_load.request(f"/{kind.decode()}", b"{}") for kind in kinds], 4, 60, count)
    answers = await serving_load.drive(plan)
    server.close()
    return answers


def test_the_load_counts_every_request_by_status_and_those_without_an_answer():
    answers = asyncio.run(_drive([b"200", b"422", b"200", b"break"], 40))
    assert answers.statuses == {200: 20, 422: 10}
    assert sum(answers.failures.values()) == 10
    found = serving_load.summary(answers, 2.0)
    assert found["per_s"] == 15
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]


def test_percentiles_are_of_all_rounds_and_goals_fail_beyond_their_limits():
    seconds = {size: [[0.001] * 98 + [0.5] * 2, [0.001] * 100] for size in serving.SIZES}
    fast = serving.figures({**seconds, serving.LARGE: [[2.0]]})
    assert fast["512 rows p50"] == 1
    assert fast["512 rows p99"] == 500 == fast["1 rows p99"]
    assert fast["rows/s"] == serving.LARGE / 2
    slow = {key: 2 * value for key, value in fast.items()}
    names = (serving.FULL, serving.BEST, serving.ONNX)
    text = serving.goals({"latency": dict(zip(names, (fast, fast, slow), strict=True))})
    assert text.splitlines()[0].startswith("FAIL: p99 of 512 rows from dictionaries")
    assert text.count("pass") == 6
    assert serving.goals({"latency": dict(zip(names, (fast, slow, fast), strict=True))}).count("FAIL") == 7
    ne = {"fp32": {"a": 0.5, "b": 0.6}, "int8": {"a": 0.5, "b": 0.6 + 2e-3}}
    assert serving.goals({"quality": ne}).startswith("FAIL")
    assert serving.goals({"quality": ne | {"int8": ne["fp32"]}}).startswith("pass")
