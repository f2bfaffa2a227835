"""How far an evaluation is behind its trainer."""

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
    """How far a checkpoint is behind the trainer's last heartbeat; once training has ended, behind the newest checkpoint.

    Args:
        committed: see `commit_time`.
    Returns: {"steps": int, "seconds": float}, neither below 0, without seconds once training has ended; None where the
        heartbeat is damaged, or `committed` is None.
    """
    try:
        status = run.status()
    except UserError:
        return None
    if committed is None:
        return None
    if status and status.state == "training":
        return {"steps": max(0, status.step - step), "seconds": max(0.0, status.time - committed)}
    return {"steps": max(0, max(checkpoint.steps(run.checkpoints), default=step) - step)}
