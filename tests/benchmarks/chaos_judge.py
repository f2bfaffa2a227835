"""What chaos.py compares: a run that was disturbed with one that was not, and what commands print and leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "training")]

from tiny_training import PATHS, TRAIN_ROWS, tensors  # noqa: E402

from pipeline.run import checkpoint  # noqa: E402
from pipeline.run.run import Run  # noqa: E402
from pipeline.storage.files import read_lines  # noqa: E402

STEPS, EPOCH, EVERY = 40, 12, 4
SETTINGS = {
    "batch_size": 36, "lanes": 12, "max_steps": STEPS, "epochs": 9, "checkpoint_every": EVERY, "keep": {"last": 2},
    "dense": {"name": "adamw", "lr": 0.003, "decay": "cosine"}, "timeout": 10, "log_every": 1,
}  # fmt: skip
DROPOUT, MARGIN = 0.3, 10
COMMAND_S, GONE_S = 180, 30  # that a command may take, and processes to be gone after it
CLOCK = ("time", "rows_per_s", "data_wait", "seconds_left")
UNCLEAN = ("Traceback", "terminate called", "frame #", "Fatal")


@dataclass
class Outcome:
    """Of a seed.

    Attributes:
        faults: that came, by kind. commands: given. wrong: what is not as in an undisturbed run, one line each.
        deviation: of the weights, relative to what rank counts differ by; 0 where they are the same bit for bit.
    """

    name: str
    faults: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    wrong: list[str] = field(default_factory=list)
    log: str = ""
    starts: int = 0
    again: int = 0
    deviation: float = 0.0
    seconds: float = 0.0


def judge(folder: Path, outcome: Outcome, counts: list[int]) -> None:
    """Compares a run with undisturbed ones; adds to `wrong` what differs.

    Args:
        counts: numbers of ranks that it may have had; one if it never changed.
    """
    same = len(counts) == 1
    path, run = folder / outcome.name, Run(folder / outcome.name)
    reference = undisturbed(folder, counts[0], DROPOUT if same else 0)
    wrong, status, starts = outcome.wrong, run.status(), run.starts()
    if status is None or (status.state, status.step) != ("finished", STEPS):
        wrong.append(f"status: {status}")
        return
    attempts, history = rows_by_step(folder, outcome.name), rows_by_step(folder, reference.name)
    outcome.starts, outcome.again = len(starts), sum(map(len, attempts.values())) - len(attempts)
    outcome.faults["other rank count"] += sum(a.ranks != b.ranks for a, b in pairwise(starts))
    wrong += [f"rows of step {s}" for s in range(1, STEPS + 1) if last(attempts, s) != last(history, s)]
    for begin in range(0, STEPS - EPOCH, EPOCH):
        rows = [row for step in range(begin + 1, begin + EPOCH + 1) for row in last(attempts, step)]
        if not len(rows) == len(set(rows)) == TRAIN_ROWS:
            wrong.append(f"epoch from step {begin + 1}: {len(rows)} rows, {len(set(rows))} different ones")
    for file in ("train.jsonl", "progressive.jsonl"):
        found, expected = (list(read_lines(where / "metrics" / file)) for where in (path, reference))
        if [line["step"] for line in found] != [line["step"] for line in expected]:
            wrong.append(f"{file}: lines of steps {[line['step'] for line in found]}")
        elif same:
            wrong += [
                f"{file}: step {a['step']}" for a, b in zip(found, expected, strict=True) if timeless(a) != timeless(b)
            ]
    found, expected = (checkpoint.steps(where / "checkpoints") for where in (path, reference))
    hidden = sorted(entry.name for entry in (path / "checkpoints").glob(".*"))
    # Preemption saves at steps of its own. Retention that was killed comes with the next checkpoint, which the last has not.
    if found[-1:] != expected[-1:] or not 0 <= len(found) - len(expected) <= 1 or hidden:
        wrong.append(f"checkpoints of steps {found}, not {expected}; left: {hidden}")
    theirs = newest(path)
    if same:
        wrong += [
            f"tensor {n}" for n, t in newest(reference).items() if n not in theirs or not torch.equal(theirs[n], t)
        ]
    else:
        outcome.deviation = deviation(theirs, newest(reference)) / spread(folder)
        if outcome.deviation > MARGIN:
            wrong.append(f"weights: {outcome.deviation:.1f} times what rank counts differ by")


@cache
def undisturbed(folder: Path, ranks: int, dropout: float) -> Path:
    """A run without a fault."""
    name = f"whole-{ranks}-{dropout}"
    (folder / f"{name}.faults.json").write_text("[]")
    words = [f"--nproc-per-node={ranks}", *script(folder, name, 0, SETTINGS | {"dropout": dropout})]
    code, log = command(folder, name, words)
    assert code == 0, log
    return folder / name


@cache
def spread(folder: Path) -> float:
    """The most that undisturbed runs on 1, 2, 3 and 4 ranks differ by: the same sums in other orders."""
    states = [newest(undisturbed(folder, ranks, 0)) for ranks in (1, 2, 3, 4)]
    return max(deviation(a, b) for a, b in combinations(states, 2))


def deviation(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference in a tensor, relative to its largest number; infinite where names or shapes differ.

    Sums of progressive validation are each rank's own, and left out.
    """
    found, wanted = ({n: t.double() for n, t in x.items() if not n.startswith("progress.")} for x in (found, wanted))
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in wanted.items()}:
        return float("inf")
    return max(
        float((found[n] - t).abs().max() / t.abs().max().clamp(min=1e-9)) for n, t in wanted.items() if t.numel()
    )


def newest(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint."""
    return tensors(checkpoint.folder(run / "checkpoints", STEPS))


def rows_by_step(folder: Path, name: str) -> dict[int, dict[int, list[int]]]:
    """For each step the rows that each attempt (a line of restarts.jsonl) has taken in it, sorted."""
    starts = [start.time for start in Run(folder / name).starts()]
    found: dict[int, dict[int, list[int]]] = {}
    for file in (folder / f"{name}.seen").glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            attempt = sum(begin < line["time"] for begin in starts)
            found.setdefault(line["step"], {}).setdefault(attempt, []).extend(line["rows"])
    return {step: {attempt: sorted(rows) for attempt, rows in by.items()} for step, by in found.items()}


def last(steps: dict[int, dict[int, list[int]]], step: int) -> list[int]:
    """The rows of the attempt that has taken a step last."""
    attempts = steps.get(step, {-1: []})
    return attempts[max(attempts)]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what the clock decides."""
    return {key: value for key, value in line.items() if key not in CLOCK}


def script(folder: Path, name: str, attempt: int, settings: dict[str, Any]) -> list[str]:
    """The arguments of jobs.launch for a rank of a run."""
    return [str(Path(__file__).with_name("chaos_rank.py")), str(folder), name, str(attempt), json.dumps(settings), "[]"]


def command(folder: Path, name: str, words: list[str]) -> tuple[int, str]:
    """jobs.launch to its end: its exit code and what it printed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "PYTHONPATH": PATHS, "TMPDIR": str(folder),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60", "PAUSE": "0.03",
    }  # fmt: skip
    log = folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.launch", *words], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            output.write(f"\nhangs: still there after {COMMAND_S} s\n")
    return process.returncode, log.read_text()


def unclean(code: int, log: str) -> list[str]:
    """What a command should not have printed, or not have left out."""
    lines = log.splitlines()
    found = [f"printed: {line}" for line in lines if any(sign in line for sign in UNCLEAN) or line.startswith("hangs")]
    if code not in (0, os.EX_TEMPFAIL, -signal.SIGKILL) and not any(line.startswith("error") for line in lines):
        found.append(f"exit code {code} without an error line")
    return found


def leftovers(word: str) -> list[str]:
    """Kills, and returns, the processes with a word in their command line that are not gone soon."""
    end = time.monotonic() + GONE_S
    while (found := running(word)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(found.values())


def running(word: str) -> dict[int, str]:
    """Processes with a word among those of their command line, but this one."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if word in words or {str(Path(word).parent), Path(word).name} <= set(words):
                found[int(path.parent.name)] = f"pid {path.parent.name}: {' '.join(words)[:200]}"
    return {pid: line for pid, line in found.items() if pid != os.getpid()}
