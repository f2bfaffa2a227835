"""Sections of serving.py that are about processes: time to the first answer, and jobs.serve under load."""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from serving_contenders import one_thread
from serving_load import Plan, load, request
from serving_workload import Workload
from tabulate import tabulate

from pipeline.serving.scorer import Scorer

HERE = Path(__file__).parent
SIZES = (1, 32, 512)
CONNECTIONS = {1: 32, 32: 16, 512: 4}  # at once, by rows of a request
BAD, BAD_CONNECTIONS = 10_000, 256
BODIES = 16  # different ones of a size
GROWTH = 16 << 20  # bytes of memory between the middle and the end of a soak that count as flat
READY_S = 120.0
# Printed once the first answer is there.
FIRST = {
    "torch alone": "import torch",
    "package, exported": "from pipeline.serving.scorer import Scorer; Scorer.load(package).score(rows)",
    "package, compiled": "from pipeline.serving.scorer import Scorer; Scorer.load(package, compiled=True).score(rows)",
    "package, exported, unchecked, not warmed up": (
        "from pipeline.serving.scorer import Scorer; Scorer.load(package, check=False, warm_up=0).score(rows)"
    ),
    "eager": (
        "import serving_workload as w; work = w.Workload(*map(Path, paths)); work.slow_path()(rows)"
    ),
    "torch-rechub": (
        "import numpy as np, onnxruntime as o; s = o.InferenceSession(paths[0] + '/rechub.onnx')\n"
        "s.run(None, {i.name: np.zeros([1] * len(i.shape), 'int64' if 'int' in i.type else 'float32') for i in s.get_inputs()})"
    ),
    "LightGBM": (
        "import numpy as np, lightgbm as g\n"
        "for i in range(3):\n"
        "    m = g.Booster(model_file=f'{paths[0]}/lightgbm-{i}.txt'); m.predict(np.zeros((1, m.num_feature())))"
    ),
}  # fmt: skip


class Server(NamedTuple):
    """A running jobs.serve. seconds: from its start to the first answer."""

    process: subprocess.Popen[bytes]
    port: int
    seconds: float


def starts(work: Workload, form: str, rounds: int = 3) -> dict[str, float]:
    """Seconds from the start of a process to its first answer of one row, the least of some rounds."""
    paths = [str(path) for path in (work.folder, work.data, work.trained)]
    given = json.dumps({"package": str(work.package(form)), "rows": work.raw_rows[:1], "paths": paths})
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, code in FIRST.items():
            if name in ("torch-rechub", "LightGBM") and not list(work.folder.glob("rechub.onnx")):
                continue  # `latency` has made no contenders
            seconds.setdefault(name, []).append(first_answer(code, given))
        for name, compiled in (("server, exported", "false"), ("server, compiled", "true")):
            with serving(work.package(form), work.raw_rows[:1], compiled) as server:
                seconds.setdefault(name, []).append(server.seconds)
    found = {name: min(each) for name, each in seconds.items()}
    print(tabulate(list(found.items()), ["", "s to the first answer"], floatfmt=".2f", tablefmt="pipe"))
    return found


def first_answer(code: str, given: str) -> float:
    """Seconds until a new process has run some code."""
    script = (
        "import json, sys; from pathlib import Path; globals().update(json.load(sys.stdin))\n"
        + code
        + "\nprint(1, flush=True)"
    )
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", ""), str(HERE.parents[1] / ".venv" / "rechub")])
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**one_thread(), "PYTHONPATH": path},
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        process.stdin.write(given)
        process.stdin.close()
        line = process.stdout.readline()
        seconds = time.perf_counter() - begin
    if not line:
        raise SystemExit(f"no answer of: {code}")
    return seconds


@contextmanager
def serving(package: Path, rows: list[dict[str, Any]], compiled: str, core: int | None = None) -> Iterator[Server]:
    """jobs.serve on a free port, on one core, once it has answered; ended by SIGTERM, which it must obey."""
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    port = free_port()
    command = [sys.executable, "-m", "jobs.serve", f"package={package}", f"port={port}", f"compiled={compiled}"]
    begin = time.perf_counter()
    process = subprocess.Popen([*pinned, *command, "drain_s=0"], env=one_thread(), stderr=subprocess.DEVNULL)
    try:
        while not (answer := post(port, rows)):
            if process.poll() is not None or time.perf_counter() - begin > READY_S:
                raise SystemExit(f"the server gave no answer: {' '.join(command)}")
            time.sleep(0.01)
        assert answer["scores"]
        yield Server(process, port, time.perf_counter() - begin)
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(port: int, rows: list[dict[str, Any]]) -> Any:
    """The answer to a request, or None while nobody listens."""
    body = json.dumps({"candidates": rows}).encode()
    sent = urllib.request.Request(f"http://127.0.0.1:{port}/score", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent) as answer:
            return json.load(answer)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise


def load_tests(work: Workload, options: argparse.Namespace, cores: tuple[int, int]) -> dict[str, Any]:
    """One server on one core, the load from another: throughput by size, bad requests, memory of a long load."""
    form, lines, found = options.formats[0], [], {}
    with serving(work.package(form), work.raw_rows[:1], "true", cores[0]) as server:
        check_answers(work, form, server.port)
        for size in SIZES:
            plan = Plan(server.port, bodies(work, size), CONNECTIONS[size], options.seconds)
            found[f"{size} rows"] = got = load(plan, cores[1])
            lines.append(
                [size, plan.connections, got["per_s"], got["per_s"] * size, got["p50_ms"], got["p99_ms"], failed(got)]
            )
        header = ["rows", "connections", "requests/s", "rows/s", "p50 ms", "p99 ms", "not 200"]
        print(tabulate(lines, header, floatfmt=("", "", ",.0f", ",.0f", ".2f", ".2f", ""), tablefmt="pipe"))
        found["bad"] = bad = bad_requests(work, server, cores[1])
        found["soak"] = soak = soaked(work, server, options.soak, cores[1])
        check_answers(work, form, server.port)
    flat = soak["memory"][-1] - soak["memory"][1]
    found["goals"] = {
        "every request under load answered with 200": not any(failed(found[f"{size} rows"]) for size in SIZES),
        f"{sum(bad['statuses'].values()):,} bad requests answered with {', '.join(bad['statuses'])}, none broken": (
            all(status.startswith("4") for status in bad["statuses"]) and not bad["failures"]
        ),
        f"memory after {soak['requests']:,} requests, from the middle to the end: {flat / 1e6:+.1f} MB": flat < GROWTH,
        "the server ended by SIGTERM with exit code 0": server.process.returncode == 0,
    }
    return found


def failed(got: dict[str, Any]) -> int:
    """Requests without an answer of 200."""
    return sum(n for status, n in got["statuses"].items() if status != "200") + sum(got["failures"].values())


def bodies(work: Workload, size: int) -> list[str]:
    """Different requests of a size."""
    parts = (work.raw_rows[index * size : (index + 1) * size] for index in range(BODIES))
    return [request("/score", json.dumps({"candidates": rows}).encode()) for rows in parts]


def check_answers(work: Workload, form: str, port: int) -> None:
    """What the server answers is what a Scorer says of the same rows."""
    rows = work.raw_rows[:64]
    expected, answer = Scorer.load(work.package(form), compiled=True).score(rows), post(port, rows)["scores"]
    for task, value_B in expected.items():
        np.testing.assert_allclose(answer[task], value_B, rtol=0, atol=1e-6)


def bad_requests(work: Workload, server: Server, core: int) -> dict[str, Any]:
    """10,000 requests that no server should answer with scores, many at once."""
    before = memory(server)
    row = work.raw_rows[0]
    rows: list[Any] = [
        3, {"no_such_column": 1}, row | {"age": "old"}, row | {"age": [1]}, row | {"age": float("nan")},
        row | {"age": float("inf")}, row | {"sex": {}},
    ]  # fmt: skip
    contents: list[Any] = [
        None,
        [],
        {},
        {"candidates": 3},
        {"candidates": [row], "more": 1},
        {"candidates": [row] * 5000},
    ]
    contents += [{"user": [row], "candidates": [{}]}, *({"candidates": [row, one]} for one in rows)]
    plans = [request("/score", json.dumps(content).encode()) for content in contents]
    plans += [
        request("/score", text)
        for text in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"candidates": [' + b"9" * 5000)
    ]
    good = json.dumps({"candidates": [row]}).encode()
    plans += [
        request("/score", good, length=1 << 30),
        request("/nowhere", good),
        request("/score", good, "DELETE"),
        request("/score", good, kind="text/csv"),
    ]
    got = load(Plan(server.port, plans, BAD_CONNECTIONS, 600, BAD), core)
    alive = post(server.port, [row]) is not None
    print(f"bad requests: {got['statuses']}, broken connections {got['failures']}, {got['per_s']:,.0f} a second,",
          f"p99 {got['p99_ms']:.0f} ms; afterwards it {'answers' if alive else 'DOES NOT ANSWER'},",
          f"memory {(memory(server) - before) / 1e6:+.1f} MB")  # fmt: skip
    return got | {"alive": alive, "memory": [before, memory(server)]}


def soaked(work: Workload, server: Server, seconds: float, core: int) -> dict[str, Any]:
    """Requests of one row one after the other for some time; memory at the start, in the middle, at the end."""
    found, requests = [memory(server)], 0
    for _ in range(2):
        got = load(Plan(server.port, bodies(work, 1), CONNECTIONS[1], seconds / 2), core)
        requests += sum(got["statuses"].values())
        found.append(memory(server))
    print(f"memory: {', '.join(f'{size / 1e6:.1f}' for size in found)} MB at the start, in the middle and at the end of",
          f"{requests:,} requests in {seconds:.0f} s, {requests / seconds:,.0f} a second")  # fmt: skip
    return {"memory": found, "requests": requests, "seconds": seconds}


def memory(server: Server) -> int:
    """Bytes that are the server's alone: pages of its tables, which other processes may share, do not count."""
    found = psutil.Process(server.process.pid)
    return statistics.median_low([found.memory_full_info().uss for _ in range(3)])
