"""Faults done to real runs, and how long each is until training goes on: python tests/benchmarks/faults.py.

Each run is tests/training/faulty_run.py on a small dataset, two ranks unless said, a checkpoint every 5 of 50 steps. What is
timed is therefore everything but the work: noticing, restarting processes, importing, loading the checkpoint. Rows are
counted by row_id over all ranks and attempts: lost and repeated ones are those that the run's final history misses or
holds twice.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tabulate import tabulate

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "training")]

from tiny_training import TRAIN_ROWS, make_dataset  # noqa: E402

from pipeline.run import checkpoint  # noqa: E402

STEPS, EPOCH = 50, 13
COLUMNS = ["fault", "noticed by", "exit", "steps taken again", "rows lost", "rows repeated", "s to train again"]


def main() -> None:
    """Runs all faults, prints the table and writes results/faults.json."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder / "data")
        for what, noticed, parts in FAULTS:
            rows.append(suffer(folder, what, noticed, parts))
            print(f"{len(rows)}/{len(FAULTS)} {what}", file=sys.stderr, flush=True)
    print(tabulate([row.values() for row in rows], COLUMNS, floatfmt=".1f"))
    (Path(__file__).parent / "results" / "faults.json").write_text(json.dumps(rows, indent=1) + "\n")


# What happens, who notices, and the commands that follow each other: (ranks, settings, faults, restarts, damage before it).
FAULTS = [
    ("SIGKILL of one rank in the midst of step 33", "the other rank", [(2, {}, [[0, 1, 33, "SIGKILL", "self"]], 1, None)]),
    ("a rank that hangs (SIGSTOP), timeout=5", "the other rank, by name",
     [(2, {"timeout": 5}, [[0, 1, 33, "SIGSTOP", "self"]], 1, None)]),
    ("SIGTERM to the launcher, the same command again", "all ranks, in one step",
     [(2, {}, [[0, 0, 33, "SIGTERM", "launcher"]], 0, None), (2, {}, [], 0, None)]),
    ("SIGTERM, then on with 4 ranks instead of 2", "all ranks, in one step",
     [(2, {}, [[0, 0, 33, "SIGTERM", "launcher"]], 0, None),
      (4, {"sharding": {"default": ["row_wise"]}}, [], 0, None)]),
    ("SIGTERM, then on with 1 rank instead of 2", "all ranks, in one step",
     [(2, {}, [[0, 0, 33, "SIGTERM", "launcher"]], 0, None), (1, {}, [], 0, None)]),
    ("SIGKILL, and the newest checkpoint has a flipped bit", "its checksum",
     [(2, {}, [[0, 1, 33, "SIGKILL", "self"]], 0, None), (2, {}, [], 0, "flip")]),
    ("SIGKILL, and a file of the newest checkpoint is cut", "its size",
     [(2, {}, [[0, 1, 33, "SIGKILL", "self"]], 0, None), (2, {}, [], 0, "cut")]),
]  # fmt: skip


def suffer(folder: Path, what: str, noticed: str, parts: list) -> dict[str, object]:
    """One run with its faults: a row of the table."""
    name, codes, attempt = "-".join(filter(str.isalnum, what))[:80], [], 0
    for ranks, settings, faults, restarts, damage in parts:
        if damage:
            spoil(folder / name / "checkpoints", damage)
        begin = time.time()
        codes.append(launch(folder, name, ranks, attempt, settings, faults, restarts))
        attempt += 1 + restarts
    lines = [json.loads(line) for file in (folder / f"{name}.seen").iterdir() for line in file.read_text().splitlines()]
    first, then = (sorted({line["attempt"] for line in lines}))[:2]
    before = [line for line in lines if line["attempt"] == first]
    again = [line for line in lines if line["attempt"] == then]
    # A fault that a second command follows is timed from that command on.
    since = begin if len(parts) > 1 else max(line["time"] for line in before)
    lost, repeated = account(lines)
    return {
        "fault": what,
        "noticed": noticed,
        "exit": ", then ".join(map(str, codes)),
        "again": max(
            0, max(line["step"] for line in lines if line["attempt"] == first) - min(line["step"] for line in again) + 1
        ),
        "lost": lost,
        "repeated": repeated,
        "seconds": min(line["time"] for line in again) - since,
    }


def launch(folder: Path, name: str, ranks: int, attempt: int, settings: dict, faults: list, restarts: int) -> int:
    """A command to its end; its exit code."""
    script = [str(TESTS / "training" / "faulty_run.py"), str(folder), name, str(attempt)]
    script += [json.dumps({"checkpoint_every": 5} | settings), json.dumps(faults)]
    torchrun = ["-m", "jobs.launch", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "training"))),
    }
    command = [sys.executable, *(torchrun if ranks > 1 else []), *script]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode


def spoil(checkpoints: Path, how: str) -> None:
    """Damages the newest checkpoint."""
    file = checkpoint.folder(checkpoints, checkpoint.steps(checkpoints)[-1]) / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "flip" else content[:-100])


def account(lines: list[dict]) -> tuple[int, int]:
    """Rows that the history of a run, the last attempt of each step, misses, and those it holds more than once an epoch."""
    last = {step: max(x["attempt"] for x in lines if x["step"] == step) for step in {x["step"] for x in lines}}
    final = [x for x in lines if x["attempt"] == last[x["step"]]]
    seen = Counter(((x["step"] - 1) // EPOCH, row) for x in final for row in x["rows"])
    epochs = STEPS // EPOCH  # whole ones
    lost = epochs * TRAIN_ROWS - sum(epoch < epochs for epoch, _ in seen) + STEPS - len(last)
    return lost, sum(count > 1 for count in seen.values())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main()
