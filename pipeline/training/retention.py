"""Which checkpoints of a run stay."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline import checkpoint
from pipeline.run import Run, read_lines
from pipeline.training.config import Keep


def surplus(steps: Sequence[int], keep: Keep, records: Iterable[dict[str, Any]] = ()) -> list[int]:
    """Those of `steps`, ascending, that nothing in `keep` asks for; none where it asks for nothing.

    Args:
        records: of eval.jsonl.
    """
    if keep == Keep():
        return []
    wanted = {*steps[-1:], *(steps[-keep.last :] if keep.last else [])}
    wanted |= {step for step in steps if keep.every and step % keep.every == 0}
    if keep.best:
        read = [record for record in records if record["split"] == keep.best and record["step"] in steps]
        wanted |= {*steps} - {record["step"] for record in read} | best(read)
    return [step for step in steps if step not in wanted]


def best(records: Sequence[dict[str, Any]]) -> set[int]:
    """For each task the step of its lowest NE, or MSE where it is a regression; of equal ones the first."""
    figures: dict[str, list[tuple[float, int]]] = {}
    for record in records:
        for task, metrics in record["metrics"].items():
            value = metrics["ne"] if "ne" in metrics else metrics["mse"]
            if value is not None:
                figures.setdefault(task, []).append((value, record["step"]))
    return {min(found)[1] for found in figures.values()}


def prune(run: Run, keep: Keep) -> None:
    """Deletes the surplus, except what somebody reads at the moment: that is left for the next time."""
    try:
        for step in surplus(checkpoint.steps(run.checkpoints), keep, read_lines(run.eval_metrics)):
            checkpoint.remove(checkpoint.folder(run.checkpoints, step))
    except OSError as error:
        print(f"{run.checkpoints}: old checkpoints cannot be deleted: {error}", file=sys.stderr, flush=True)
