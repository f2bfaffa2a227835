"""Whether memory grows with steps or with the dataset: python tests/benchmarks/soak.py.

First a tiny model trains for 20,000 steps of 64 rows, checkpoints and logs included, and the memory of its process is looked
at ten times a second: what is resident after some of the steps, and the slope of a line through all looks past the first
1,000. Then jobs.train passes once over datasets of the same rows once, 4 and 16 times, with the same settings: the most that
was ever resident, and of it what the process holds for itself: the rest is mostly pages of the dataset's files, which the
kernel takes back when it needs them. Kept in results/soak.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate
from train_runs import CONF, RESULTS, command, environment, machine, preprocess, write_raw

EVERY = 0.1  # seconds between looks
MARKS = (1_000, 5_000, 10_000, 20_000)  # steps; at the first everything that is kept once is there
TIMES = (1, 4, 16)
MIB = 1 << 20


class Look(NamedTuple):
    """At a process: when, bytes resident, and of them those of no file."""

    time: float
    resident: int
    own: int


def main() -> None:
    """Runs both parts, prints two tables, keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=MARKS[-1], help="fewer: a trial, not kept")
    parser.add_argument("--rows", type=int, default=100_000, help="of the smallest dataset")
    options = parser.parse_args()
    marks = [mark * options.steps // MARKS[-1] for mark in MARKS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_raw(folder / "raw-1", options.rows)
        data = {1: preprocess(folder / "raw-1", folder / "data-1")}
        steps = soak(data[1], folder / "soak", marks)
        print(steps_table(steps), flush=True)
        for times in TIMES[1:]:
            data[times] = preprocess(repeated(folder / "raw-1", times), folder / f"data-{times}")
        sizes = [one_pass(data[times], folder / f"run-{times}", options.rows * times) for times in TIMES]
        print("\n" + sizes_table(sizes))
    if options.steps == MARKS[-1]:
        content = {"machine": machine(), "steps": steps, "sizes": sizes}
        (RESULTS / "soak.json").write_text(json.dumps(content, indent=1) + "\n")


def repeated(raw: Path, times: int) -> Path:
    """The same files so many times under other names: the same values, so that vocabularies and tables stay as they are."""
    folder = raw.with_name(f"raw-{times}")
    folder.mkdir()
    for file in raw.iterdir():
        for copy in range(times):
            os.link(file, folder / f"rows-{copy}-{file.name}")
    return folder


def soak(data: Path, run: Path, marks: list[int]) -> dict[str, Any]:
    """Trains to the last of the marks, watched."""
    looks = watched(
        ["train.batch_size=64", "train.lanes=4", "train.window=1024", f"train.max_steps={marks[-1]}", "train.log_every=100"],
        data, run,
    )  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics" / "train.jsonl").read_text().splitlines()]
    return by_step(looks, [(r["time"], r["step"]) for r in records], marks)


def by_step(looks: list[Look], reached: list[tuple[float, int]], marks: list[int]) -> dict[str, Any]:
    """Memory by step.

    Args:
        reached: steps, and when they were taken. marks: steps, ascending; the slope is that between the first and the last.
    """
    times, steps = zip(*reached, strict=True)
    step_of_look = np.interp([look.time for look in looks], times, steps)
    resident = np.array([look.resident for look in looks])
    # Before the first step and after the last, interpolation stands still.
    between = (step_of_look >= marks[0]) & (step_of_look < marks[-1])
    slope = float(np.polyfit(step_of_look[between], resident[between], 1)[0])
    at = {str(mark): int(resident[between][np.abs(step_of_look[between] - mark).argmin()]) for mark in marks}
    return {"resident": at, "bytes_per_step": slope, "looks": int(between.sum()), "seconds": times[-1] - times[0]}


def one_pass(data: Path, run: Path, rows: int) -> dict[str, int]:
    """The most memory of a pass over a dataset, in bytes, and the bytes of its files."""
    looks = watched(["train.batch_size=4096", "train.lanes=8", "train.window=2048", "train.epochs=1"], data, run)
    size = sum(file.stat().st_size for file in data.glob("train/*.parquet"))
    peak, own = max(look.resident for look in looks), max(look.own for look in looks)
    return {"rows": rows, "files": size, "peak_resident": peak, "peak_own": own}


def watched(settings: list[str], data: Path, run: Path) -> list[Look]:
    """Runs jobs.train on one rank and looks at its memory until it ends. Raises SystemExit if it fails."""
    job = ["-m", "jobs.train", CONF, "model=bench_tiny", f"dataset={data}", f"run={run}", "train.threads=1", *settings]
    job += [] if "train.epochs=1" in settings else ["train.epochs=9999", "train.keep.last=2"]
    looks = []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command(job), env=environment(), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with suppress(OSError, KeyError):  # it has just ended
                looks.append(look(process.pid))
            time.sleep(EVERY)
        output.seek(0)
        if process.returncode:
            sys.exit("jobs.train failed:\n" + "".join(output.readlines()[-12:]))
    return looks


def look(pid: int) -> Look:
    """At a process's memory now. Raises OSError or KeyError where it has ended."""
    status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return Look(time.time(), int(status["VmRSS"]) * 1024, int(status["RssAnon"]) * 1024)


def steps_table(found: dict[str, Any]) -> str:
    """Resident memory by step."""
    lines = [[int(step), size / MIB] for step, size in found["resident"].items()]
    title = (
        f"{found['bytes_per_step']:+.1f} bytes a step between the first and the last of these, "
        f"{found['looks']:,} looks in {found['seconds']:.0f} s"
    )
    return tabulate(lines, ["after step", "resident (MiB)"], intfmt=",", floatfmt=",.1f") + "\n" + title


def sizes_table(found: list[dict[str, int]]) -> str:
    """Peaks by dataset."""
    lines = [[f["rows"], *(f[key] / MIB for key in ("files", "peak_resident", "peak_own"))] for f in found]
    headers = ["rows", "dataset (MiB)", "most resident (MiB)", "of it not of files (MiB)"]
    return tabulate(lines, headers, intfmt=",", floatfmt=",.1f")


if __name__ == "__main__":
    main()
