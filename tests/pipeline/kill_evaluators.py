"""Kills evaluators at many moments: kill_evaluators.py RUN KILLS [again] prints one JSON line for each.

RUN has checkpoints and no evaluation; with `again` both are evaluated, but a file of the first record is missing. A forked
evaluator of two checkpoints kills itself with SIGKILL just before its n-th look-up, lock, write, rename or removal of a file
of the run. Then another one evaluates what is left. A first evaluator runs to its end, to list the moments: KILLS of them are
tried, first those that change a file or a lock.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.quick_imports import quick_imports

with quick_imports():
    import torch.utils.tensorboard  # noqa: F401  here, and not in each of its children

    from features.errors import UserError
    from pipeline.evaluation import predictions
    from pipeline.evaluation.follow import EvaluateConfig, evaluate
    from pipeline.evaluation.metrics import evaluated
    from pipeline.run.run import Run
    from pipeline.storage.files import read_lines

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}
STEPS = [2, 4]
QUICK = {"buckets": 2, "cold_start": False, "by_time": []}  # few slices


def forked(path: Path, on_event: Callable[[str, tuple], object] | None = None) -> int:
    """Evaluates in a child; returns how it ended."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hooked = [True]

    def hook(name: str, given: tuple) -> None:
        if hooked and name in EVENTS and (name == "fcntl.flock" or str(path) in str(given)):
            on_event(name, given)

    if on_event:
        sys.addaudithook(hook)
    list(evaluate(EvaluateConfig(run=path, threads=1, step=STEPS, predictions=True, **QUICK)))
    hooked.clear()
    os._exit(0)


def kill_at(number: int) -> Callable[[str, tuple], None]:
    left = [number]

    def count(_name: str, _given: tuple) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return count


def events_of(path: Path) -> list[str]:
    """The events of an evaluator that is left alone, each with what it is about."""
    notes = path.with_name("events")
    descriptor = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    assert forked(path, lambda *what: os.write(descriptor, f"{what}\n".encode())) == 0
    os.close(descriptor)
    return notes.read_text().splitlines()


def changes(event: str) -> bool:
    """Whether an event is more than a look at a file."""
    name, *given = eval(event, {"__builtins__": {}, "PosixPath": str})  # as events_of wrote it
    return name != "open" or bool(given[0][2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def state(path: Path) -> dict[str, object]:
    """See `state_here`: in a child, since a process that has read Parquet has threads, and can fork no more."""
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, json.dumps(state_here(path)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return json.loads(pipe.read())


def state_here(path: Path) -> dict[str, object]:
    """Records, files that are whole, and files that nobody should find."""
    run = Run(path)
    whole = []
    for step in STEPS:
        try:
            figures = evaluated.read(path / "evaluations" / f"test-{step:08d}.parquet").provenance.checkpoint
            rows = len(predictions.read(predictions.path(run, "test", step)))
        except UserError:
            continue
        whole.append([step, figures, rows])
    lines = [
        [line["step"], line["checkpoint"], line["metrics"]["click"]["ne"]] for line in read_lines(run.eval_metrics)
    ]
    hidden = [p.name for name in ("metrics", "evaluations") for p in (path / name).glob(".*.*.*")]
    return {"lines": lines, "whole": whole, "left": sorted(name for name in hidden if not name.endswith(".lock"))}


def main(path: Path, kills: int, again: bool) -> None:
    if again:
        assert forked(path) == 0
        (path / "evaluations" / "test-00000002.parquet").unlink()
    fresh = Path(shutil.copytree(path, path.with_name("fresh")))
    events = events_of(path)
    print(json.dumps(state(path)), flush=True)
    changing = [i for i, event in enumerate(events) if changes(event)]
    others = [i for i in range(len(events)) if i not in set(changing)]
    more = max(kills - len(changing), 0)
    renames = [i for i in changing if events[i].startswith("('os.rename'")]  # a half-written file is there before each
    moments = spread(changing, kills) | spread(others, more) | spread(renames, 2)
    for moment in sorted(moments):
        shutil.rmtree(path)
        shutil.copytree(fresh, path)
        code, between = forked(path, kill_at(moment)), state(path)
        then = forked(path)
        print(json.dumps([events[moment], code, between, then, state(path)]), flush=True)


def spread(among: list[int], count: int) -> set[int]:
    """At most `count` of them, as far from each other as can be, the last one too."""
    last = len(among) - 1
    return {among[last - i * last // max(count - 1, 1)] for i in range(count)} if among else set()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "again" in sys.argv)
