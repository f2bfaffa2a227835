"""Kills writers of a checkpoint at many moments: kill_checkpoint_writers.py FOLDER prints one JSON line for each.

FOLDER holds step-00000001. A forked writer of step 2 kills itself with SIGKILL just before its n-th look-up, write, rename or
removal of a file; FOLDER is inspected after each, and step 2 is written again by a writer that is not killed. A first writer
runs to its end, to count the moments.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
KILLS = 25
ABOUT = {"rows": 1, "epoch": 0, "cursors": [1], "seed": 0, "window": 1, "batch_size": 1}
ABOUT |= {"data": "d", "fingerprint": "f", "encoders": "e", "config": "c"}


def write(folder: Path, step: int) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = {"model": {"w": torch.full((300, 20), float(step)), "b": torch.arange(7) * step}}
    checkpoint.save(folder, state, CheckpointManifest(step=step, **ABOUT))
    dist.destroy_process_group()


def forked(folder: Path, step: int, on_event: Callable[[], None] | None = None) -> int:
    """Writes in a child; returns how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hooked = [True]
    if on_event:
        sys.addaudithook(
            lambda name, given: on_event() if hooked and name in EVENTS and str(folder) in str(given) else None
        )
    write(folder, step)
    hooked.clear()
    os._exit(0)


def kill_after(number: int) -> Callable[[], None]:
    left = [number]

    def count() -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return count


def whole(folder: Path) -> list[int]:
    """The steps whose content is what was written for them."""
    good = []
    for step in checkpoint.steps(folder):
        path = checkpoint.folder(folder, step)
        try:
            checkpoint.check(path)
        except UserError:
            continue
        state = {"model": {"w": torch.zeros(300, 20), "b": torch.zeros(7, dtype=torch.int64)}}
        checkpoint.load(path, state, alone=True)
        if (state["model"]["w"] == step).all() and torch.equal(state["model"]["b"], torch.arange(7) * step):
            good.append(step)
    return good


def main(folder: Path) -> None:
    notes = folder.with_name("events")
    descriptor = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    assert forked(folder, 1) == 0
    assert forked(folder, 2, lambda: os.write(descriptor, b"x") and None) == 0
    events = notes.stat().st_size
    for number in sorted({round(k * (events - 1) / (KILLS - 1)) for k in range(KILLS)}):
        shutil.rmtree(checkpoint.folder(folder, 2), ignore_errors=True)
        code = forked(folder, 2, kill_after(number))
        after = whole(folder), checkpoint.steps(folder)
        again = forked(folder, 2)
        checkpoint.tidy(folder)
        print(json.dumps([number, code, *after, again, whole(folder), sorted(p.name for p in folder.iterdir())]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
