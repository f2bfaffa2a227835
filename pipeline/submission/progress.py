"""How far a run has come, read from its folder: the same on every cluster."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from features.printable import printable
from pipeline.run.headline import HEADLINE
from pipeline.run.run import Run, Start
from pipeline.storage.files import read_lines
from pipeline.terminal import short_decimal

SHOWN = 3  # restarts


class Progress(NamedTuple):
    """Of a run.

    Attributes:
        state: that the trainer wrote last. step, steps: of the run. age: seconds since the trainer wrote its status.
        rows_per_s, seconds_left: over the last logged steps; None before the first of them.
        checkpoint: the newest one's step; None before the first. checkpoint_age: seconds since it was committed.
        starts: when ranks have begun to train, and why.
        metrics: of the newest evaluation or, before one, of training: task to metric and value. source: which of these.
    """

    state: str
    step: int
    steps: int
    age: float
    rows_per_s: float | None
    seconds_left: float | None
    checkpoint: int | None
    checkpoint_age: float | None
    metrics: dict[str, tuple[str, float]]
    source: str
    starts: list[Start]


def read(path: Path) -> Progress | None:
    """Progress of the run in a folder; None before its trainer has written its first status. Raises UserError."""
    from pipeline.run import checkpoint  # which imports torch: `list`, `logs` and `stop` do without

    run = Run(path)
    if (status := run.status()) is None:
        return None
    trained = [*read_lines(run.train_metrics)][-1:]
    evaluated = [*read_lines(run.eval_metrics)][-1:]
    last: dict[str, Any] = trained[0] if trained else {}
    steps = checkpoint.steps(run.checkpoints)
    metrics, source = _metrics(evaluated[0]["metrics"] if evaluated else {}), ""
    if metrics:
        source = f"{evaluated[0]['split']}, step {evaluated[0]['step']:,}"
    elif last:
        metrics = {task: ("ne", value) for task, value in last.get("ne", {}).items() if value is not None}
        source = f"train, step {last['step']:,}"
    now, training = time.time(), status.state == "training"
    return Progress(
        status.state, status.step, status.steps, now - status.time,
        last.get("rows_per_s") if training else None,
        last.get("seconds_left") if training else None,
        steps[-1] if steps else None,
        now - (checkpoint.folder(run.checkpoints, steps[-1]) / "manifest.json").stat().st_mtime if steps else None,
        metrics, source, run.starts(),
    )  # fmt: skip


def _metrics(by_task: dict[str, Any]) -> dict[str, tuple[str, float]]:
    found = {}
    for task, metrics in by_task.items():
        name = next((name for name in HEADLINE.values() if metrics.get(name) is not None), None)
        if name:
            found[task] = (name, float(metrics[name]))
    return found


def lines(progress: Progress) -> list[tuple[str, str]]:
    """What `status` prints of it: what, and its value."""
    p = progress
    share = f" ({p.step / p.steps:.0%})" if p.steps else ""
    found = [("run", f"{p.state}, {duration(p.age)} ago"), ("step", f"{p.step:,} of {p.steps:,}{share}")]
    if p.rows_per_s is not None:
        found.append(("rows/s", f"{p.rows_per_s:,.0f}"))
    if p.seconds_left is not None:
        found.append(("time left", duration(p.seconds_left)))
    if p.checkpoint is not None and p.checkpoint_age is not None:
        found.append(("checkpoint", f"step {p.checkpoint:,}, {duration(p.checkpoint_age)} ago"))
    if p.metrics:
        values = "  ".join(f"{name.upper()} {task} {short_decimal(value)}" for task, (name, value) in p.metrics.items())
        found.append(("metrics", f"{values} ({p.source})"))
    if again := p.starts[1:]:
        found.append(("restarts", f"{len(again)}, the last ones:"))
        found += [("", _start(start)) for start in again[-SHOWN:]]
    return found


def _start(start: Start) -> str:
    nodes = f" of {start.nodes} nodes" if start.nodes > 1 else ""
    ranks = "1 rank" if start.ranks == 1 else f"{start.ranks} ranks"
    where = f"{duration(time.time() - start.time)} ago from step {start.step:,} on {ranks}{nodes}"
    return f"{where}: {printable(start.reason)}"


def duration(seconds: float) -> str:
    """Such as 12 s, 3m 20s, 2h 05m, 3d 4h."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600}h"
