"""Values that no log has, bursts of bad requests and packages that are replaced, at a server of a package of real files."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_package
from asgi import Reply, post, running
from real_package import expected

from pipeline.serving.http.app import Service, create_app
from pipeline.serving.http.config import ServeConfig
from pipeline.serving.http.metrics import Metrics
from pipeline.serving.http.packages import Packages
from pipeline.serving.scorer import Scorer

GOOD = {"city": "rome", "recent": ["a", "c"], "age": 31}


@pytest.fixture
def packages(package: Path) -> Iterator[Packages]:
    found = Packages(ServeConfig(package=package, poll_s=3600, max_body_bytes=64 << 20), Metrics())
    found.start()
    yield found
    found.close()


def replies(packages: Packages, contents: list[Any]) -> list[Reply]:
    """Answers to requests that are sent at once."""

    async def run() -> list[Reply]:
        async with running(app := create_app(Service(packages, packages.settings, packages.metrics))):
            return await asyncio.gather(*(post(app, content) for content in contents))

    return asyncio.run(run())


def row(text: str) -> bytes:
    """A request of two rows, the second as JSON says."""
    return f'{{"candidates": [{{"city": "rome", "age": 1}}, {{{text}}}]}}'.encode()


REFUSED = {
    f'"city": "{"x" * 10_000_000}"': "candidates[1].city",
    '"age": "old"': "candidates[1].age",
    '"age": [1]': "candidates[1].age",
    '"age": {"x": 1}': "candidates[1].age",
    '"age": 1e999': "candidates[1].age",
    '"age": -1e999': "candidates[1].age",
    '"age": NaN': "candidates[1].age",
    f'"age": {"9" * 400}': "candidates[1].age",
    '"city": 12345678901234567890': "candidates[1].city",
    '"city": {"a": 1}': "candidates[1].city",
    '"city": [["a"]]': "candidates[1].city",
    '"recent": [["a"]]': "candidates[1].recent",
    '"recent": [{"a": 1}]': "candidates[1].recent",
    '"town": "rome"': "candidates[1].town",
    '"clicks\\u0000": 1': "candidates[1].clicks",
}
TAKEN = [
    f'"city": "{"x" * 100_000}"',
    '"city": "a\\u0000b\\u001b[31m"',
    '"city": "\\ud83d\\ude00"',
    '"age": "nan"',
    '"city": true',
    '"city": ""',
    '"recent": "a"',
    '"recent": [null, 1, "a"]',
    f'"recent": {json.dumps(["a"] * 100_000)}',
    '"age": "31.5"',
    '"age": -0.0',
    '"age": null',
    "",
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_values_that_a_log_cannot_have_are_refused_with_their_field(packages: Packages, text: str) -> None:
    (found,) = replies(packages, [row(text)])
    assert found.status == 422, found.body[:300]
    assert found.json["error"].startswith(REFUSED[text])
    assert len(found.json["error"]) < 1100
    assert found.json["error"].isprintable()


def test_values_that_a_log_can_have_are_scored_and_finite(packages: Packages) -> None:
    for text, found in zip(TAKEN, replies(packages, [row(text) for text in TAKEN]), strict=True):
        assert found.status == 200, (text[:50], found.body[:300])
        assert all(0 < value < 1 for value in found.json["scores"]["click"])


def test_a_burst_of_bad_requests_changes_no_good_one(packages: Packages) -> None:
    packages.settings = packages.settings.model_copy(update={"max_waiting": 10_000})
    good = {"candidates": [GOOD, {**GOOD, "age": None}]}
    bad = [row(text) for text in REFUSED if len(text) < 1000] + [
        b"",
        b"[" * 1000,
        b"\xff",
        {"candidates": [GOOD] * 5000},
    ]
    contents = [bad[n % len(bad)] for n in range(160)] + [good] * 16
    random.Random(0).shuffle(contents)
    found = replies(packages, contents)
    for content, reply in zip(contents, found, strict=True):
        assert reply.status == 200 if content is good else reply.status in (400, 422)
        if content is good:
            wanted = [expected(each)[0] for each in good["candidates"]]
            assert reply.json["scores"]["click"] == pytest.approx(wanted, abs=1e-6)
    assert packages.metrics.held == 0


def test_a_package_in_the_place_of_another_takes_over_and_a_broken_one_does_not(tmp_path: Path) -> None:
    real_package.write(tmp_path / "p")
    packages = Packages(ServeConfig(package=tmp_path / "p", poll_s=3600), Metrics())
    packages.start()

    def scored() -> tuple[int, float]:
        (found,) = replies(packages, [{"candidates": [GOOD]}])
        return found.json["model"]["step"], found.json["scores"]["spent"][0]

    def replace(seed: int, broken: bool = False) -> None:
        real_package.write(tmp_path / "new", seed)
        if broken:
            (tmp_path / "new" / "tables" / "dim-00004.bin").write_bytes(b"short")
        (tmp_path / "p").rename(tmp_path / f"before-{seed}")
        (tmp_path / "new").rename(tmp_path / "p")
        packages.poll()

    assert scored() == (1, pytest.approx(expected(GOOD, 1)[1], rel=1e-5))
    replace(2, broken=True)
    assert scored() == (1, pytest.approx(expected(GOOD, 1)[1], rel=1e-5))
    assert "dim-00004.bin has 5 bytes" in str(packages.problem)
    replace(3)
    assert scored() == (3, pytest.approx(expected(GOOD, 3)[1], rel=1e-5))
    assert packages.problem is None
    packages.close()


def test_requests_scored_at_once_get_what_each_gets_alone(package: Path, packages: Packages) -> None:
    scorer = Scorer.load(package, warm_up=0)
    generator = random.Random(1)
    contents = [
        {
            "user": {"recent": generator.choices("abcd", k=generator.randrange(6))},
            "candidates": [
                {"city": generator.choice(["rome", "paris", "x", None]), "age": generator.choice([3, 2.5, "7", None])}
                for _ in range(generator.randrange(1, 9))
            ],
        }
        for _ in range(40)
    ]
    packages.settings = packages.settings.model_copy(update={"batch_wait_ms": 20.0})
    for content, found in zip(contents, replies(packages, contents), strict=True):
        alone = scorer.score(content["candidates"], content["user"])
        for task, values in found.json["scores"].items():
            assert values == pytest.approx(alone[task].tolist(), rel=0, abs=1e-6)
    batches = packages.metrics.registry.get_sample_value("taskfuse_serve_batch_requests_count")
    assert batches is not None
    assert batches < 40
