"""The questions of gpu.py, a function each: from a Bench to rows of a table, one dictionary a row."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_workload as work
import torch
from gpu_probes import TimeLimitError, copies, host_syncs, limit, synchronise, take
from gpu_workload import LANES, configuration, supports

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.training.observer import Observer
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # of a loss, relative to the CPU's
CASE_S = 75  # a case of `steps`, compilation included
KILLED_S = 90  # a killed rank is noticed long before
RANKS_S = 150  # what `two_gpus` is left
Row = dict[str, Any]


@dataclass
class Bench:
    """What the sections share.

    Attributes:
        folder: for datasets and runs. small: a form for a CPU and a few seconds. end: time.monotonic() at which all is over.
    """

    folder: Path
    device: torch.device
    small: bool
    end: float
    made: dict[str, Path] = field(default_factory=dict)

    def data(self, kind: str) -> Path:
        """A dataset of gpu_workload, written when it is first asked for."""
        if kind not in self.made:
            self.made[kind] = work.dataset(self.folder / kind, kind, self.small)
        return self.made[kind]

    def run(self) -> Path:
        """A folder for a run."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def trainer_of(bench: Bench, kind: str, model: str, *observers: Observer, **train: Any) -> Trainer:
    """A trainer of a run of its own, once what the one before it held on the device is free."""
    data = bench.data(kind)
    gc.collect()
    torch.compiler.reset()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    return prepare(configuration(data, bench.run(), model, **train), None, bench.device, observers)


def trains(bench: Bench) -> list[Row]:
    """Does it train, save and resume, with the losses of a CPU?"""
    steps, rows = (4, 64) if bench.small else (20, 4_096)
    data, names = bench.data("demo"), ("uninterrupted", "resumed", "CPU")
    losses = {}
    for name in names:
        run, ends = bench.run(), (steps // 2, steps) if name == "resumed" else (steps,)
        if name == "CPU" and bench.device.type == "cuda":
            on_cpu(data, run, rows, steps)
        else:
            for end in ends:
                train(data, run, rows, end, bench.device)
        losses[name] = [json.loads(line)["loss"] for line in (run / "metrics" / "train.jsonl").read_text().splitlines()]
    pairs = [("uninterrupted", "CPU"), ("resumed", "uninterrupted")]
    return [compared(losses[one], losses[other], f"{one}, against {other}", steps) for one, other in pairs]


def compared(found: list[float], wanted: list[float], what: str, steps: int) -> Row:
    """The largest relative difference of two runs' losses, and whether it is small enough."""
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
    return {"run": what, "steps": len(found), "difference": difference,
            "ok": len(found) == steps and difference <= TOLERANCE}  # fmt: skip


def train(data: Path, run: Path, rows: int, end: int, device: torch.device) -> None:
    """Trains to a step, from the newest checkpoint where there is one."""
    settings = {"batch_size": rows, "max_steps": end, "log_every": 1}
    prepare(configuration(data, run, "mmoe", **settings), None, device).run_to_end()


def on_cpu(data: Path, run: Path, rows: int, end: int) -> None:
    """The same in a process that sees no GPU."""
    command = [sys.executable, str(HERE / "gpu.py"), "--reference", str(data), str(run), str(rows), str(end)]
    done = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"on the CPU: {done.stderr[-2000:]}")


class StepProbe(Observer):
    """Profiles some steps of a trainer, counts host syncs in as many more, and times as many without either."""

    def __init__(self, warmup: int, count: int) -> None:
        self.warmup, self.count, self.rows = warmup, count, [Row()]
        self.open, self.times = ExitStack(), list[float]()

    def on_step(self, trainer: Trainer, output: object) -> None:
        step, device = trainer.state.step - self.warmup, trainer.device
        if step in (0, self.count, 2 * self.count, 3 * self.count):
            synchronise(device)
            self.open.close()
            self.times.append(time.perf_counter())
        if step == 0:
            self.profiler = torch.profiler.profile(activities=activities(device))
            self.open.enter_context(self.profiler)
        elif step == self.count:
            self.syncs = self.open.enter_context(host_syncs(device))


def activities(device: torch.device) -> list[Any]:
    """What the profiler records."""
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU] + [kinds.CUDA] * (device.type == "cuda")


def data_path(bench: Bench) -> list[Row]:
    """A whole trainer on its own loader: rows/s, copies to the device by kind, waits of the host by where they are caused."""
    warmup, count, rows = (2, 2, 64) if bench.small else (10, 10, 4_096)
    probe = StepProbe(warmup, count)
    with probe.open:
        trainer_of(bench, "demo", "mmoe", probe, batch_size=rows, max_steps=warmup + 3 * count).run_to_end()
    copied = copies(probe.profiler.events(), bench.device)
    found = [{"what": "rows/s with the loader", "a step": rows * count / (probe.times[3] - probe.times[2])}]
    found += [{"what": f"copy {kind}", "a step": number / count} for kind, number in copied.most_common()]
    return found + [
        {"what": f"host sync at {where}", "a step": number / count} for where, number in probe.syncs.most_common(25)
    ]


def loader(bench: Bench) -> list[Row]:
    """Rows a second that a rank decodes, by workers."""
    found = []
    rows = 64 if bench.small else 8_192
    numbers = {"wide": (0,)} if bench.small else {"wide": (0, 1, 2, 4, 8), "demo": (0, 4)}
    for kind in numbers:
        for workers in numbers[kind] if supports("decode_workers") else (None,):
            setting = {"batch_size": rows, "window": work.GROUP} | (
                {} if workers is None else {"decode_workers": workers}
            )
            found.append({"schema": kind, "workers": workers, "rows/s": decoded(bench, kind, setting)})
    return found


def decoded(bench: Bench, kind: str, settings: dict[str, Any]) -> float:
    """Rows a second of an epoch, after one that starts the workers."""
    made = trainer_of(bench, kind, "mmoe", **settings).loader
    with limit(60):
        for _ in made.batches(made.start()):
            pass
        begin = time.perf_counter()
        seen = sum(len(batch.row_id_B) for batch in made.batches(made.start(1)))
        return seen / (time.perf_counter() - begin)


@dataclass(frozen=True)
class Case:
    """Steps of one model on one schema."""

    model: str
    kind: str = "demo"
    rows: int = 4_096
    precision: str = "fp32"
    compile: str | None = None

    def train(self) -> dict[str, Any]:
        """Settings of `train`."""
        settings = {"batch_size": self.rows, "precision": self.precision, "compile": self.compile}
        return settings | {"decode_workers": 0}  # batches are in memory


# By importance: what does not fit into the time is left out from the end.
GRAPHS, COMPILED = "reduce-overhead", "default"
CASES = [
    Case("mmoe"),
    Case("mmoe", compile=GRAPHS),
    Case("mmoe", "wide", 32_768),
    Case("mmoe", compile=COMPILED),
    Case("mmoe", "wide", 32_768, "tf32"),
    Case("mmoe", "wide", 32_768, "bf16"),
    Case("adatt"),
    Case("adatt", compile=GRAPHS),
    Case("ple"),
    Case("autotask"),
    Case("autotask", compile=COMPILED),
    Case("autotask of rows"),
    Case("autotask of rows", compile=GRAPHS),
    Case("mmoe", "wide", 32_768, "bf16", GRAPHS),
    Case("ple", "wide", 32_768, "tf32"),
    Case("adatt", "wide", 32_768, "tf32"),
    Case("adatt", "demo", 32_768),
    Case("ple", compile=GRAPHS),
    Case("adatt", "demo", 32_768, "bf16", GRAPHS),
    Case("autotask", "demo", 32_768),
    Case("mmoe", "wide"),
    Case("mmoe", "wide", compile=GRAPHS),
    Case("ple", "wide", 32_768, "bf16", GRAPHS),
]
SMALL_CASES = [Case("mmoe", rows=64), Case("mmoe", "wide", 64, "bf16", COMPILED), Case("autotask", rows=64)]


def steps(bench: Bench) -> list[Row]:
    """A step on batches that are in memory: milliseconds, kernels, and the share of the time in which the GPU computes."""
    found = []
    reserve = RANKS_S if bench.device.type == "cuda" and torch.cuda.device_count() > 1 else 5
    for case in SMALL_CASES if bench.small else CASES:
        row = {"model": case.model, "schema": case.kind, "rows": case.rows, "format": case.precision,
               "compile": case.compile or "eager"}  # fmt: skip
        bench.data(case.kind)  # its time is no case's
        seconds = min(CASE_S, bench.left() - reserve)
        if not supports("precision", case.precision):
            row["error"] = "no such setting"
        elif seconds <= 0:
            row["error"] = "no time left"
        else:
            row |= guarded(lambda case=case: measured(bench, case), seconds)
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    return found


def measured(bench: Bench, case: Case) -> Row:
    """A case's figures."""
    warmup, timed = (1, 2) if bench.small else (8, 24)
    trainer = trainer_of(bench, case.kind, case.model, **case.train())
    return take(trainer, in_memory(bench, trainer, case.rows), warmup, timed)


def in_memory(bench: Bench, trainer: Trainer, rows: int) -> list[Any]:
    """Two batches of this rank, pinned where there is a GPU."""
    made = Loader(Dataset(trainer.config.dataset), "train", rows, LANES, 0, trainer.rank, trainer.ranks)
    batches = work.batches(made, 2)
    return [batch.pin_memory() for batch in batches] if bench.device.type == "cuda" else batches


def guarded(run: Callable[[], Row], seconds: float) -> Row:
    """What a case gives, or the error that ended it; `ok` is False for those that are no matter of time."""
    try:
        with limit(seconds):
            return run()
    except TimeLimitError as error:
        return {"error": str(error)}
    except Exception as error:  # one case does not end the others
        return {"error": f"{type(error).__name__}: {error}"[:500], "ok": False}


def two_gpus(bench: Bench) -> list[Row]:
    """Two ranks against one, the exchange's share of a step, and how long the launcher takes to end once a rank is killed."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        return [{"ranks": 1, "error": "this machine has one GPU"}]
    if bench.left() < RANKS_S / 2:
        return [{"ranks": 2, "error": "no time left"}]
    found = []
    for ranks in (1, 2):
        command = [sys.executable, "-m", "jobs.launch", f"--nproc-per-node={ranks}", str(HERE / "gpu_ranks.py")]
        command += [str(bench.data("wide")), str(bench.run()), *(["--small"] if bench.small else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RANKS_S / 2, check=False)
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks: {done.stderr[-2000:]}")
        found.append({"ranks": ranks, **json.loads(done.stdout.splitlines()[-1])})
    found[1]["scaling"] = found[1]["rows/s"] / found[0]["rows/s"]
    title = "s until a killed rank has ended the job"
    return [*found, {"ranks": 2} | guarded(lambda: {title: killed(bench.folder)}, KILLED_S)]


def killed(folder: Path) -> float:
    """Seconds from SIGKILL of one of two ranks, in the midst of a step, to the end of the launcher, which does not restart."""
    from faults import launch
    from tiny_training import make_dataset

    make_dataset(folder / "data")
    try:
        launch(folder, "killed", 2, 0, {}, [[0, 1, 33, "SIGKILL", "self"]], 0)
        ended = time.time()
    finally:
        files = (folder / "killed.seen").glob("*.jsonl")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        for pid in {line["pid"] for line in lines}:  # of ranks that have not noticed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return ended - max(line["time"] for line in lines)
