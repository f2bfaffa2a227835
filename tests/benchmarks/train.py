"""Training throughput of taskfuse beside what it is measured against, in one run: python tests/benchmarks/train.py.

Per round, model and trainer: a process of its own on the workload of workload.py, 4,096 rows a rank and step. Ratios are
taken within a round, so that a machine that slows down slows both sides; the medians over the rounds are printed and
kept in results/. taskfuse goes the whole way: CSV through jobs.preprocess, then jobs.train under torchrun.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import torch
import workload
from tabulate import tabulate

HERE = Path(__file__).parent
RECHUB = HERE.parents[1] / ".venv" / "rechub"
COLUMNS = ["rows/s", "x rechub", "x loop", "x matmuls", "data wait", "first step after"]


def main() -> None:
    """Runs the rounds, prints a table for each model, writes results/train.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["mmoe", "ple"], choices=["mmoe", "ple"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bf16", action="store_true", help="also taskfuse, loop and matmuls in bf16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder))
        for model in options.models:
            rounds = []
            for number in range(options.rounds):
                rounds.append({name: run() for name, run in contenders(data, model, options).items()})
                print(f"{model} round {number + 1}/{options.rounds}", file=sys.stderr, flush=True)
            report(model, rounds)


def prepare(folder: Path) -> Path:
    """The workload's rows as CSV files, then as a dataset."""
    table = pa.table(workload.rows())
    (folder / "raw").mkdir()
    for part in range(4):
        size = len(table) // 4
        pa.csv.write_csv(table.slice(part * size, size), folder / "raw" / f"rows-{part}.csv")
    command = ["-m", "jobs.preprocess", f"--config-dir={HERE / 'conf'}", "data=workload", f"out={folder / 'data'}"]
    subprocess.run([sys.executable, *command, f"input={folder / 'raw'}"], check=True, capture_output=True)
    return folder / "data"


def contenders(data: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is timed, in order: name to a function that runs it once."""
    found: dict[str, Any] = {
        "taskfuse, 1 rank": lambda: taskfuse(data, model, 1, options.steps),
        "torch-rechub": lambda: baseline("rechub", model, options.steps),
        "plain loop": lambda: baseline("loop", model, options.steps),
        "matrix products alone": lambda: baseline("matmuls", model, options.steps),
        "taskfuse, 2 ranks": lambda: taskfuse(data, model, 2, options.steps),
    }
    if options.bf16:
        found["taskfuse, 1 rank, bf16"] = lambda: taskfuse(data, model, 1, options.steps, "train.precision=bf16")
        found["plain loop, bf16"] = lambda: baseline("loop", model, options.steps, "--dtype", "bf16")
        found["matrix products alone, bf16"] = lambda: baseline("matmuls", model, options.steps, "--dtype", "bf16")
    return found


def taskfuse(data: Path, model: str, ranks: int, steps: int, *more: str) -> dict[str, float]:
    """One training run: median rows/s, share of time waiting for data, seconds from process start to the first step."""
    run = Path(tempfile.mkdtemp(dir=data.parent))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [
        sys.executable, *launcher, "-m", "jobs.train", f"--config-dir={HERE / 'conf'}", f"dataset={data}", f"run={run}",
        f"model=bench_{model}", f"train.batch_size={workload.BATCH * ranks}", "train.lanes=8", "train.threads=1",
        f"train.max_steps={steps + 10}", "train.epochs=9", "train.log_every=10", *more,
    ]  # fmt: skip
    begin = time.time()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = [json.loads(line) for line in (run / "metrics" / "train.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    steady = [r for r in records if r["step"] > 10]
    return {
        "rows_per_s": statistics.median(r["rows_per_s"] for r in steady),
        "data_wait": statistics.mean(r["data_wait"] for r in steady),
        "first_step_s": records[0]["time"] - begin,
    }


def baseline(name: str, model: str, steps: int, *more: str) -> dict[str, float]:
    """One run of baselines.py, on one thread."""
    command = [sys.executable, str(HERE / "baselines.py"), name, "--model", model, "--threads", "1", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECHUB) if name == "rechub" else ""}
    done = subprocess.run([*command, "--steps", str(steps)], check=True, capture_output=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def report(model: str, rounds: list[dict[str, dict[str, float]]]) -> None:
    """Prints the medians over the rounds and keeps them."""

    def median(name: str, key: str) -> float | None:
        values = [r[name][key] for r in rounds if key in r[name]]
        return statistics.median(values) if values else None

    def ratio(name: str, to: str) -> float:
        return statistics.median(r[name]["rows_per_s"] / r[to]["rows_per_s"] for r in rounds)

    rows = []
    for name in rounds[0]:
        dtype = ", bf16" if name.endswith("bf16") else ""
        others = ["torch-rechub", f"plain loop{dtype}", f"matrix products alone{dtype}"]
        rows.append(
            [name, median(name, "rows_per_s"), *(ratio(name, o) for o in others), median(name, "data_wait"),
             median(name, "first_step_s")]
        )  # fmt: skip
    formats = ("", ",.0f", ".2f", ".2f", ".2f", ".1%", ".1f")
    print(f"\n{model}, fp32 unless said, 1 thread a rank, median of {len(rounds)} rounds")
    print(tabulate(rows, [model, *COLUMNS], floatfmt=formats, missingval=""), flush=True)
    path = HERE / "results" / f"train-{model}.json"
    path.parent.mkdir(exist_ok=True)
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
