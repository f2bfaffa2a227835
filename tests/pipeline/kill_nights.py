"""Kills nights at many moments: kill_nights.py FOLDER prints one JSON line for each.

A first night has blessed a checkpoint. A forked second one, which passes and blesses another, kills itself with SIGKILL just
before its n-th look-up, write, rename or removal of a file; what it left is inspected, and the same night is run again without
a kill. A first one runs to its end, to list the moments. So do the same night judged anew (again=true), and then going back
(bless=back). Nothing here computes before it forks: threads do not survive that.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.quick_imports import quick_imports

with quick_imports():
    from nightly_world import day, encode_day, night, no_beam, train_run, write_day

    from features.errors import UserError
    from pipeline.release.config import NightlyConfig
    from pipeline.release.night import read_night
    from pipeline.release.nightly import go_back, nightly
    from pipeline.release.serving import read_serving
    from pipeline.run.retention import pinned_steps
    from pipeline.run.run import Run

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SETTINGS = {"by_time": [], "cold_start": False, "buckets": 5, "bless": "pass", "data_gates": {"action": "warn"}}
PLACED = ("night.json", "serving.json", "pins/step", "candidate.parquet", "/day-")
COMMANDS: dict[str, Callable[[Path], object]] = {
    "judge": lambda root: judge(root, 2, 20),
    "again": lambda root: judge(root, 2, 20, again=True),
    "back": lambda root: go_back(NightlyConfig(out=root / "nights", date=day(2), bless="back", withdraw=day(2))),
}
SPREAD = {
    "judge": 8,
    "again": 2,
    "back": 50,
}  # kills over the whole of each, besides those where a result is put into place


def forked(work: Callable[[], object]) -> int:
    """Works in a child; returns how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def watched(work: Callable[[Path], object], root: Path, on_event: Callable[[str], None]) -> None:
    """Works, and ends the process; `on_event` hears of each file event."""
    hooked = f"{root}/nights", f"{root}/run/pins"
    sys.addaudithook(
        lambda name, given: (
            on_event(f"{name} {given}") if name in EVENTS and any(h in str(given) for h in hooked) else None
        )
    )
    work(root)
    os._exit(0)  # the hook stays


def judge(root: Path, number: int, step: int, **settings: Any) -> None:
    alone = root / "alone" / day(number)
    with no_beam():
        nightly(night(alone, root / "nights", number, run=root / "run", step=step, **SETTINGS, **settings))


def make(root: Path) -> None:
    """Logs, a run, and the first night, of day 1."""
    for number in range(3):
        write_day(root / "alone" / day(number), number, rows=300)
    encode_day(root / "alone" / day(0), root / "days", 0)
    train_run(root / "days", root / "run", last=0, steps=20)
    lax = {"metric": "ne", "max": 9, "allow_ne_above_one": True}
    (root / "run" / "gates.yaml").write_text(json.dumps({"default": [lax, {"metric": "rows", "min": 1}]}))
    judge(root, 1, 10)


def kill_after(number: int) -> Callable[[str], None]:
    left = [number]

    def count(_: str) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return count


def restore(root: Path) -> None:
    """What was there before the command."""
    for folder in ("nights", "run/pins"):
        shutil.rmtree(root / folder)
        shutil.copytree(root / "before" / folder, root / folder)


def found(root: Path) -> dict[str, Any]:
    """What a night left, but for times and the random names of the encoded day's files."""
    recorded, pointer = read_night(root / "nights" / day(2)), read_serving(root / "nights")
    for step in recorded.steps if recorded else ():
        step.summary.get("record", {}).pop("time", None)
    left = [str(file.relative_to(root)) for file in (root / "nights").rglob("*") if file.name.startswith(".")]
    return {
        "outcome": recorded and recorded.outcome,
        "steps": [[s.name, s.state, s.name == "bless" or s.summary] for s in recorded.steps] if recorded else [],
        "served": [[entry.step, entry.night] for entry in pointer.entries] if pointer else [],
        "pinned": sorted(pinned_steps(Run(root / "run"))),
        "left": sorted(name for name in left if not name.endswith(".lock")),
    }


def main(root: Path) -> None:
    assert forked(lambda: make(root)) == 0
    for command in COMMANDS:  # each begins where the one before it has ended
        kill(root, command)


def kill(root: Path, command: str) -> None:
    work = COMMANDS[command]
    shutil.rmtree(root / "before", ignore_errors=True)
    for folder in ("nights", "run/pins"):
        shutil.copytree(root / folder, root / "before" / folder)
    notes = root / command
    descriptor = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    assert forked(lambda: watched(work, root, lambda what: os.write(descriptor, f"{what}\n".encode()) and None)) == 0
    events = notes.read_text().splitlines()
    whole, spread = found(root), SPREAD[command]
    moments = {len(events) * i // spread for i in range(spread)}
    for place in PLACED:
        renames = [i for i, event in enumerate(events) if event.startswith("os.rename") and place in event]
        moments |= {i + after for i in renames[-1:] for after in (0, 1) if i + after < len(events)}
    for moment in sorted(moments):
        restore(root)
        code = forked(lambda moment=moment: watched(work, root, kill_after(moment)))
        killed = found(root)
        again = forked(lambda: work(root))
        line = {"event": events[moment], "code": code, "killed": killed, "again": again, "found": found(root)}
        print(json.dumps({"command": command, "whole": whole} | line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
