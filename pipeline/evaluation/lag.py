"""How far an evaluation is behind its trainer."""

import time

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.run import Run


def commit_time(run: Run, step: int) -> float | None:
    """When a checkpoint was committed, in seconds since 1970; None where it is not there any more."""
    try:
        return (checkpoint.folder(run.checkpoints, step) / "manifest.json").lstat().st_mtime
    except OSError:
        return None


def lag(run: Run, step: int, committed: float | None) -> dict[str, float] | None:
    """Steps and seconds from a checkpoint to the trainer's last heartbeat.

    Once training has ended they are steps to the newest checkpoint, and seconds since the checkpoint was committed.

    Args:
        committed: see `commit_time`.
    Returns: {"steps": int, "seconds": float}, neither below 0; None where the heartbeat is damaged, or `committed` is None.
    """
    try:
        status = run.status()
    except UserError:
        return None
    if committed is None:
        return None
    if status and status.state == "training":
        newest, now = status.step, status.time
    else:
        newest, now = max(checkpoint.steps(run.checkpoints), default=step), time.time()
    return {"steps": max(0, newest - step), "seconds": max(0.0, now - committed)}
