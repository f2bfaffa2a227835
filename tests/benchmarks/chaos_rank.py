"""A rank of a run of chaos.py: as faulty_run.py, and it does to its run what FOLDER/NAME.faults.json lists.

A fault is {phase, step, rank, call, acts}: the rank (modulo how many there are) does the acts, one after the other, once it is
in that phase at or past that step. Faults come one after the other, each once, whatever the number of restarts: a file in
FOLDER/NAME.injected for each that has come. Phases: import; later, call tenths of a second after it; start (restored), forward
and step; writing, the call-th fsync of a checkpoint's thread (rank 0: data, index, manifest, folder, and the folder above after
the rename; other ranks: data); committed, before retention; pruning, within it; end, between the last checkpoint and the exit.
"""

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from faulty_run import FOLDER, NAME, Faults
from tiny_training import configuration

from jobs.entry import configure_logging, sigterm_handler, user_errors
from pipeline.run import checkpoint
from pipeline.training.faults.rank_status import write_rank_status
from pipeline.training.step import StepOutput
from pipeline.training.train import train
from pipeline.training.trainer import Trainer

FAULTS = json.loads((FOLDER / f"{NAME}.faults.json").read_text())
INJECTED, CHECKPOINTS = FOLDER / f"{NAME}.injected", FOLDER / NAME / "checkpoints"
fsync, rmtree, calls = os.fsync, shutil.rmtree, threading.local()
step = 0  # taken, by this process


def next_fault() -> tuple[int, dict[str, Any] | None]:
    """Its number, and what it is; None after the last."""
    injected = len(list(INJECTED.glob("*")))
    return injected, FAULTS[injected] if injected < len(FAULTS) else None


def inject(phase: str, call: int = 0) -> None:
    """Does the next fault, if it is this rank's in this phase."""
    injected, fault = next_fault()
    if fault is None or (fault["phase"], fault["call"]) != (phase, call) or step < fault["step"]:
        return
    if fault["rank"] % int(os.environ["WORLD_SIZE"]) == int(os.environ["RANK"]):
        INJECTED.mkdir(exist_ok=True)
        (INJECTED / f"{injected:03d}").write_text(str(step))
        for act in fault["acts"]:
            ACTS[act]()


class PhasedFaults(Faults):
    """Injects faults in the phases that a trainer has."""

    def on_start(self, trainer: Trainer) -> None:
        global step
        step = trainer.state.step
        written = trainer.writer.written

        def committed(number: int, seconds: float) -> None:
            inject("committed")
            written(number, seconds)

        trainer.writer.written = committed
        inject("start")

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        super().on_forward(trainer, output)
        inject("forward")

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        global step
        super().on_step(trainer, output)
        step = trainer.state.step
        inject("step")


def striking_fsync(descriptor: int) -> None:
    """os.fsync, counted in the thread of each checkpoint."""
    if threading.current_thread().name == "checkpoint":
        calls.count = getattr(calls, "count", 0) + 1
        inject("writing", calls.count)
    fsync(descriptor)


def striking_rmtree(path: Path, ignore_errors: bool = False) -> None:
    """shutil.rmtree, with a phase of its own where retention deletes a checkpoint."""
    if path.name.endswith(".deleted"):
        inject("pruning")
    rmtree(path, ignore_errors)


def launcher() -> int:
    """The pid of jobs.launch. Raises RuntimeError where it has ended: the parent is another process then."""
    pid = os.getppid()
    if b"jobs.launch" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
        raise RuntimeError("no launcher")
    return pid


def kill_all() -> None:
    """Kills the launcher and all its ranks, as a scheduler's SIGKILL or a power cut does."""
    ours, pids = launcher(), [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    ranks = [pid for pid in pids if parent(pid) == ours and pid != os.getpid()]
    for pid in (ours, *ranks, os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int:
    """Of a process; 0 if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def newest_file(suffix: str) -> Path | None:
    """A file of the newest checkpoint."""
    steps = checkpoint.steps(CHECKPOINTS)
    return next(checkpoint.folder(CHECKPOINTS, steps[-1]).glob(f"*{suffix}"), None) if steps else None


def flip_bit() -> None:
    """Flips a bit of one of the newest checkpoint's numbers, and not a low one, which may change nothing."""
    if file := newest_file(".bin"):
        content = bytearray(file.read_bytes())
        words = range(len(content) // 8 * 4, len(content) - 3, 4)
        content[next(i for i in words if any(content[i : i + 4])) + 2] ^= 0x40
        file.write_bytes(content)


def cut_file() -> None:
    """Cuts the newest checkpoint's numbers in the middle."""
    if file := newest_file(".bin"):
        os.truncate(file, file.stat().st_size // 2)


def remove_manifest() -> None:
    """Removes the newest checkpoint's manifest."""
    if file := newest_file("manifest.json"):
        file.unlink()


def leave_staging() -> None:
    """Leaves half a checkpoint of a later step, and one whose deletion was begun."""
    for name in (f".step-{step + 1000:08d}", f".step-{step + 1:08d}", f".step-{1:08d}.{'0' * 32}.deleted"):
        (CHECKPOINTS / name).mkdir(parents=True, exist_ok=True)
        if file := newest_file(".bin"):
            shutil.copy(file, CHECKPOINTS / name / file.name)


def tear_line() -> None:
    """Leaves half a line of metrics, as a power cut does."""
    with suppress(FileNotFoundError), (FOLDER / NAME / "metrics" / "train.jsonl").open("a") as file:
        file.write('{"step": 9')


ACTS = {
    "kill rank": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop rank": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill all": kill_all,
    "TERM launcher": lambda: os.kill(launcher(), signal.SIGTERM),
    "TERM rank": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "flip bit": flip_bit,
    "cut file": cut_file,
    "remove manifest": remove_manifest,
    "leave staging": leave_staging,
    "tear line": tear_line,
}

if __name__ == "__main__":
    # As jobs.entry.job does around jobs.train, which takes no observers.
    signal.signal(signal.SIGTERM, sigterm_handler("train"))
    write_rank_status("started")
    configure_logging("info")
    with user_errors():
        inject("import")
        if (fault := next_fault()[1]) and fault["phase"] == "later":
            timer = threading.Timer(fault["call"] / 10, inject, ("later", fault["call"]))
            timer.daemon = True
            timer.start()
        os.fsync, shutil.rmtree = striking_fsync, striking_rmtree  # type: ignore[assignment]
        train(configuration(FOLDER / "data", FOLDER / NAME, **json.loads(sys.argv[4])), observers=[PhasedFaults()])
        inject("end")
    write_rank_status("finished")
