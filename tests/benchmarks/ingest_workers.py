"""What jobs.preprocess gains by a second worker, and what it loses: python tests/benchmarks/ingest_workers.py [KEY=VALUE ...].

    rows=6600000      of the generated log of ingest_workload.py, which takes just over 1 GB, and its clicks
    data=bench_join   its schema: bench_join joins the clicks, bench has them in the log
    rounds=3          of which medians are printed; within a round the runs follow each other
    only=NAME,NAME    some of the runs: direct-1, direct-2, hosts-1, hosts-2, spark-1, spark-2; nothing is kept then
    cache=FOLDER      where logs stay, by default runs/bench-ingest

direct is this machine's worker processes, hosts are worker pools on loopback, spark is a standalone cluster of as many
workers of one core, both started before the clock and not in CPU s. Each run is a job of its own process, on one thread a
worker. The profile has for each step the seconds between its beginning and the next one's, the share of them in which
workers worked, and what the rest of it went to, in seconds: until the first piece began, waiting for the last one, and
after it, when one process adds up and plans. `stretch` is the time of all pieces over that with one worker of the kind:
what workers that share caches and memory cost each other. Results are kept in results/ingest-workers.json.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ingest_workload as w
import psutil
import yaml
from ingest import HERE, ROOT, environment, machine_of, parse
from process_cost import measure
from tabulate import tabulate

NAMES = ["direct-1", "direct-2", "hosts-1", "hosts-2", "spark-1", "spark-2"]
COLUMNS = ["", "s", "CPU s", "MB/s", "x direct-1", "x one of its kind", "least", "most"]
STEP_COLUMNS = ["", "pieces", "s", "share", "worked", "began after", "waited", "planned", "stretch"]


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    rows: int = 6_600_000
    data: str = "bench_join"
    rounds: int = 3
    only: str = ""
    cache: str = str(ROOT / "runs" / "bench-ingest")


@dataclass
class StepTimes:
    """Seconds of a step; of several rounds the medians.

    Attributes:
        wall: from its beginning to that of the next one.
        busy: of all its pieces together.
        start, plan: until the first piece began, and after the last one.
        wait: of the workers that had nothing left to do, from the first piece's beginning to the last one's end, divided
            by their number.
    """

    pieces: float
    wall: float
    busy: float
    start: float
    wait: float
    plan: float


def main() -> None:
    """Makes the log, runs the rounds, prints the tables, keeps the numbers."""
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
        return
    if sys.argv[1:2] == ["job"]:
        run_job(json.loads(sys.argv[2]))
        return
    options = parse(sys.argv[1:], Options)
    names = options.only.split(",") if options.only else NAMES
    if unknown := set(names) - set(NAMES):
        raise SystemExit(f"only={min(unknown)}: no such run, there are {', '.join(NAMES)}")
    log = w.generated(Path(options.cache), options.rows)
    rounds = []
    for number in range(options.rounds):
        taken = {}
        for name in names:
            with settings_of(name) as settings:
                taken[name] = take(name, settings, log, options)
        rounds.append(taken)
        print(f"round {number + 1}/{options.rounds}", file=sys.stderr, flush=True)
    report(names, rounds, log.bytes + log.click_bytes)
    if not options.only:
        keep(options, rounds)


@contextmanager
def settings_of(name: str) -> Iterator[dict[str, Any]]:
    """The settings of a run, whose servers are there meanwhile."""
    kind, _, count = name.partition("-")
    if kind == "direct":
        yield {"workers": int(count)}
    elif kind == "hosts":
        with ExitStack() as stack:
            yield {"runner": "hosts", "hosts": [stack.enter_context(pool()) for _ in range(int(count))]}
    else:
        with spark_cluster(int(count)) as master:
            yield {"runner": "spark", "master": master}


@contextmanager
def served(*command: str, **variables: str) -> Iterator[None]:
    """A server in a process of its own."""
    with subprocess.Popen(
        command, env=environment() | variables, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def pool() -> Iterator[str]:
    """A worker pool on loopback; its address."""
    port = free_port()
    with served(sys.executable, "-m", "pipeline.ingest.runners.pool", f"--port={port}"):
        wait_for_port(port)
        yield f"127.0.0.1:{port}"


@contextmanager
def spark_cluster(count: int) -> Iterator[str]:
    """A standalone cluster of so many workers of one core on loopback; its URL."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ingest")]
    from spark_cluster import SparkCluster

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cluster = SparkCluster(Path(folder) / "spark", environment(), count)
        try:
            yield cluster.start().master
        finally:
            cluster.kill()


def free_port() -> int:
    """One that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Until something listens. Raises SystemExit where nothing does within a minute."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port}")


def take(name: str, settings: dict[str, Any], log: w.Log, options: Options) -> dict[str, Any]:
    """One run: what it took, and its profile."""
    out = Path(options.cache) / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    job = {"input": str(log.folder), "out": str(out), "schema": str(log.conf / "data" / f"{options.data}.yaml")}
    command = [sys.executable, __file__, "job", json.dumps(job | settings)]
    cost = measure(command, ROOT, environment() | {"PYTHONPATH": str(ROOT)})
    shutil.rmtree(out, ignore_errors=True)
    print(f"  {name:10} {cost.seconds:7.1f} s {cost.cpu_seconds:7.1f} CPU s", file=sys.stderr, flush=True)
    found = json.loads(cost.output.splitlines()[-1])
    steps = profile(found["times"], found["begin"], found["end"], int(name.rpartition("-")[2]))
    steps = {"start": _alone(found["begin"] - found["born"])} | steps
    steps["commit"] = _alone(cost.seconds - (found["end"] - found["born"]))
    return {"s": cost.seconds, "cpu_s": cost.cpu_seconds, "steps": {step: asdict(t) for step, t in steps.items()}}


def _alone(seconds: float) -> StepTimes:
    return StepTimes(0, seconds, 0.0, 0.0, 0.0, seconds)


def run_job(settings: dict[str, Any]) -> None:
    """The job, in a process of its own; prints when its steps and pieces ran."""
    from features.schema.schema import Schema
    from pipeline.ingest import job as ingest_job
    from pipeline.ingest.config import PreprocessConfig
    from pipeline.ingest.progress import times_of

    schema = Schema.parse(yaml.safe_load(Path(settings.pop("schema")).read_text())["schema"], "bench")
    config, run_steps, found = PreprocessConfig(**settings), ingest_job.run_steps, dict[str, Any]()

    def timed(config: Any, job: Any, limits: Any, work: Any) -> None:
        begin = time.time()
        run_steps(config, job, limits, work)
        found.update(begin=begin, end=time.time(), times=list(times_of(job.progress)))

    ingest_job.run_steps = timed
    ingest_job.preprocess(config, schema)
    print(json.dumps(found | {"born": psutil.Process().create_time()}))


def profile(times: list[tuple[str, float, float]], begin: float, end: float, workers: int) -> dict[str, StepTimes]:
    """The times of each step, from those of its pieces and of its beginning (see pipeline.ingest.progress.times_of)."""
    began = {"read": begin} | {step.removesuffix(".total"): at for step, at, _ in times if step.endswith(".total")}
    order = sorted(began, key=lambda step: began[step])
    found = {}
    for step, following in zip(order, [*order[1:], ""], strict=True):
        pieces = [(first, last) for name, first, last in times if name == step]
        next_, first, last = began.get(following, end), min(first for first, _ in pieces), max(e for _, e in pieces)
        busy = sum(last - first for first, last in pieces)
        wait = (last - first) - busy / workers
        found[step] = StepTimes(len(pieces), next_ - began[step], busy, first - began[step], wait, next_ - last)
    return found


def report(names: list[str], rounds: list[dict[str, dict[str, Any]]], size: int) -> None:
    """Prints the medians over the rounds, and the profiles."""

    def ratios(name: str, to: str) -> list[float]:
        return [taken[to]["s"] / taken[name]["s"] for taken in rounds] if to in names else []

    lines = []
    for name in names:
        one = f"{name.partition('-')[0]}-1"
        seconds, against = median(rounds, name, "s"), ratios(name, one)
        row = [name, seconds, median(rounds, name, "cpu_s"), size / 1e6 / seconds]
        row += [statistics.median(found) if (found := ratios(name, to)) else None for to in ("direct-1", one)]
        lines.append([*row, min(against, default=None), max(against, default=None)])
    print(f"\n{size / 1e9:.2f} GB, median of rounds: {len(rounds)}; ratios are of seconds on the clock")
    print(tabulate(lines, COLUMNS, floatfmt=("", ".1f", ".1f", ".1f", ".2f", ".2f", ".2f", ".2f"), missingval=""))
    for name in names:
        print(f"\n{name}")
        print(
            tabulate(step_lines(name, names, rounds), STEP_COLUMNS, floatfmt=("", ".0f", *[".2f"] * 7), missingval="")
        )


def step_lines(name: str, names: list[str], rounds: list[dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """The profile of a run."""
    kind, _, count = name.partition("-")
    whole, lines = median(rounds, name, "s"), []
    for step in rounds[0][name]["steps"]:

        def found(key: str, of: str = name, step: str = step) -> float:
            return statistics.median(taken[of]["steps"][step][key] for taken in rounds)

        one = found("busy", f"{kind}-1") if f"{kind}-1" in names else 0.0
        lines.append([
            step, found("pieces") or None, found("wall"), found("wall") / whole,
            found("busy") / int(count) / found("wall") if found("pieces") else None,
            found("start"), found("wait"), found("plan"), found("busy") / one if one else None,
        ])  # fmt: skip
    return lines


def median(rounds: list[dict[str, dict[str, Any]]], name: str, key: str) -> float:
    """Of a number over the rounds."""
    return statistics.median(taken[name][key] for taken in rounds)


def keep(options: Options, rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Writes results/ingest-workers.json."""
    machine = machine_of("apache-beam", "polars", "pyarrow", "numpy", "pyspark")
    path = HERE / "results" / "ingest-workers.json"
    content = {
        "machine": machine,
        "load": os.getloadavg(),
        "rows": options.rows,
        "data": options.data,
        "rounds": rounds,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
