"""Throughput of jobs.preprocess beside what it is measured against: python tests/benchmarks/ingest.py [KEY=VALUE ...].

    rows=6600000      of the generated log of ingest_workload.py, which takes just over 1 GB
    sample=100000     rows of the log for pipelines that take a row at a time
    rounds=3          of which medians are printed
    only=NAME,NAME    some of the runs, by their names in the table; nothing is kept then
    cache=FOLDER      where logs stay, by default runs/bench-ingest

Each run is a process of its own on one thread (with -2: two workers), from CSV files to zstd Parquet with vocabularies and
moments fitted on the train split (ingest_contenders.py). Within a round they follow each other, and ratios are taken within
rounds: a machine that slows down slows all. Results are kept in results/ingest-cpu.json. What several workers gain is
measured by ingest_workers.py.
"""

import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ingest_workload as w
from process_cost import measure
from tabulate import tabulate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLOOR, PER_ROW = "arrow", "beam-rows"
JOINED = {
    "join": "bench_join",
    "counters": "bench_counters",
}  # runs on the log whose clicks lie apart, and their schemas
PER_ROW_OF = {
    "counters": "beam-counters",
    "side-tables": "beam-tables",
}  # where the pipeline that takes a row at a time is not PER_ROW

# Settings of jobs.preprocess on the log. The others keep the order of the log, and so do the first two.
TASKFUSE = {
    "taskfuse": ["workers=1", "order=input"],
    "taskfuse-2": ["workers=2", "order=input"],
    "taskfuse-shuffled": ["workers=1"],
    "taskfuse-shuffled-2": ["workers=2"],
}
NAMES = [
    *TASKFUSE,
    FLOOR,
    "polars",
    "duckdb",
    PER_ROW,
    "census",
    *JOINED,
    "side-tables",
    *PER_ROW_OF.values(),
    "startup",
]

COLUMNS = [
    "", "log", "rows", "s", "rows/s", "MB/s", "CPU s", "rows per CPU s", "x floor", "x per row", "peak MB"
]  # fmt: skip
FORMATS = ("", "", ",.0f", ".1f", ",.0f", ".1f", ".1f", ",.0f", ".2f", ".1f", ",.0f")


@dataclass(frozen=True)
class Options:
    """Of the command line."""

    rows: int = 6_600_000
    sample: int = 100_000
    rounds: int = 3
    only: str = ""
    cache: str = str(ROOT / "runs" / "bench-ingest")


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes:
        log: what is read, by name.
        rows, bytes: of it.
        command: of the folder to write.
    """

    log: str
    rows: int
    bytes: int
    command: Callable[[Path], list[str]]


Round = dict[str, dict[str, float]]  # what each run took, by its name


def main() -> None:
    """Makes the logs, runs the rounds, prints a table, keeps the numbers."""
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
        return
    options = parse(sys.argv[1:])
    runs = {name: run_of(name, options) for name in chosen(options)}
    rounds = []
    for number in range(options.rounds):
        rounds.append({name: take(name, run, Path(options.cache)) for name, run in runs.items()})
        print(f"round {number + 1}/{options.rounds}", file=sys.stderr, flush=True)
    report(runs, rounds)
    if not options.only:
        keep(runs, rounds)


def parse(arguments: list[str], kind: Any = Options) -> Any:
    """KEY=VALUE to options of a dataclass. Raises SystemExit for another key, or a value that is no number."""
    known = {field.name: field.default for field in fields(kind)}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        try:
            values[key] = int(value) if isinstance(known[key], int) else value
        except (KeyError, ValueError):
            raise SystemExit(f"{argument}: say KEY=VALUE with {', '.join(known)}, see --help") from None
    return kind(**values)


def chosen(options: Options) -> list[str]:
    """The names of a round's runs. Raises SystemExit for one that does not exist."""
    if unknown := [name for name in options.only.split(",") if name and name not in NAMES]:
        raise SystemExit(f"only={unknown[0]}: no such run, there are {', '.join(NAMES)}")
    return options.only.split(",") if options.only else NAMES


def run_of(name: str, options: Options) -> Run:
    """What a name of the table stands for; generates the log that it needs."""
    cache, ordered = Path(options.cache), TASKFUSE["taskfuse"]
    if name == "census":
        log, files = w.census(cache), f"data.schema.source.files={w.IMPRESSIONS}"
        return Run("census", log.rows, log.bytes, taskfuse(log, "census", files, *ordered))
    sampled = dict.fromkeys([PER_ROW, *PER_ROW_OF.values()], options.sample)
    log = w.generated(cache, {**sampled, "startup": 100}.get(name, options.rows))
    if name == "startup":
        return Run("100 rows", log.rows, log.bytes, taskfuse(log, "bench", *ordered))
    if name in JOINED:
        return Run("clicks apart", log.rows, log.bytes + log.click_bytes, taskfuse(log, JOINED[name], *ordered))
    if name == "side-tables":
        return Run("items apart", log.rows, log.bytes, taskfuse(log, "bench_tables", *ordered))
    if name == "beam-tables":
        return Run("sample, items apart", log.rows, log.bytes, contender(name, log))
    if name in PER_ROW_OF.values():
        return Run("sample, clicks apart", log.rows, log.bytes + log.click_bytes, contender(name, log))
    if name in TASKFUSE:
        return Run("generated", log.rows, log.bytes, taskfuse(log, "bench", *TASKFUSE[name]))
    return Run("sample" if name == PER_ROW else "generated", log.rows, log.bytes, contender(name, log))


def taskfuse(log: w.Log, data: str, *settings: str) -> Callable[[Path], list[str]]:
    """The command line of jobs.preprocess, without the dataset's folder."""
    conf = [f"--config-dir={log.conf}"] if log.conf.exists() else []
    command = [sys.executable, "-m", "jobs.preprocess", *conf, f"data={data}", f"input={log.folder}", *settings]
    return lambda out: [*command, f"out={out}"]


def contender(name: str, log: w.Log) -> Callable[[Path], list[str]]:
    """The command line of ingest_contenders.py, without the folder it writes."""
    return lambda out: [sys.executable, str(HERE / "ingest_contenders.py"), name, str(log.folder), str(out)]


def environment() -> dict[str, str]:
    """Of every run: one thread for what asks these variables."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}


def take(name: str, run: Run, cache: Path) -> dict[str, float]:
    """One run: what it took, and the rates."""
    out = cache / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    cost = measure(run.command(out), ROOT, environment())
    shutil.rmtree(out, ignore_errors=True)
    found = {"s": cost.seconds, "cpu_s": cost.cpu_seconds, "peak_bytes": cost.peak_bytes}
    found |= {"rows_per_s": run.rows / cost.seconds, "rows_per_cpu_s": run.rows / cost.cpu_seconds}
    passes: dict[str, float] = next(
        (json.loads(line) for line in cost.output.splitlines()[::-1] if line.startswith("{")), {}
    )
    print(f"  {name:20} {cost.seconds:7.1f} s {cost.cpu_seconds:7.1f} CPU s", file=sys.stderr, flush=True)
    return found | passes


def report(runs: dict[str, Run], rounds: list[Round]) -> None:
    """Prints the medians over the rounds."""
    if lines := [line(name, runs, rounds) for name in runs if name != "startup"]:
        print(f"\nCSV to zstd Parquet, median of rounds: {len(rounds)}; ratios are of rows per CPU second")
        print(tabulate(lines, COLUMNS, floatfmt=FORMATS, intfmt=",", missingval=""))
    for name, run in runs.items():
        if "fit_s" in rounds[0][name]:
            fit, encode = (run.rows / median(name, key, rounds) for key in ("fit_s", "encode_s"))
            print(f"{name}: rows per CPU second of its passes: fit {fit:,.0f}, encode {encode:,.0f}")
    if "startup" in runs:
        seconds = median("startup", "s", rounds)
        print(f"startup: jobs.preprocess on {runs['startup'].rows} rows takes {seconds:.1f} s", flush=True)


def line(name: str, runs: dict[str, Run], rounds: list[Round]) -> list[Any]:
    """One of the table's."""
    run, seconds = runs[name], median(name, "s", rounds)
    return [
        name, run.log, run.rows, seconds, median(name, "rows_per_s", rounds), run.bytes / 1e6 / seconds,
        median(name, "cpu_s", rounds), median(name, "rows_per_cpu_s", rounds), ratio(name, FLOOR, runs, rounds),
        ratio(name, PER_ROW_OF.get(name, PER_ROW), runs, rounds), median(name, "peak_bytes", rounds) / 1e6,
    ]  # fmt: skip


def median(name: str, key: str, rounds: list[Round]) -> float:
    """Of a number over the rounds."""
    return statistics.median(taken[name][key] for taken in rounds)


def ratio(name: str, to: str, runs: dict[str, Run], rounds: list[Round]) -> float | None:
    """Rows per CPU second to those of another run, which must be of the same kind of rows: otherwise None."""
    alike = runs[name].log in ("generated", "sample") or to in PER_ROW_OF.values()
    if to not in runs or not alike:
        return None
    return statistics.median(taken[name]["rows_per_cpu_s"] / taken[to]["rows_per_cpu_s"] for taken in rounds)


def keep(runs: dict[str, Run], rounds: list[Round]) -> None:
    """Writes results/ingest-cpu.json."""
    machine = machine_of("apache-beam", "polars", "pyarrow", "numpy", "duckdb")
    logs = {name: {"log": run.log, "rows": run.rows, "bytes": run.bytes} for name, run in runs.items()}
    path = HERE / "results" / "ingest-cpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "runs": logs, "rounds": rounds}, indent=1) + "\n")


def machine_of(*packages: str) -> dict[str, Any]:
    """The machine, and versions of what is measured on it."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    return found | {name: version(name) for name in packages}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
