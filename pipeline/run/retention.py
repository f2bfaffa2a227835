"""Which checkpoints of a run stay."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError
from features.schema.schema import Split
from pipeline.run import checkpoint, records
from pipeline.run.run import Run


class Keep(BaseModel):
    """Which checkpoints stay once a newer one is there; all of them while nothing is said. The newest always stays.

    Attributes:
        last: that many of the newest.
        every: those of steps that are multiples of it.
        best: a split; of each task the one with the lowest NE (regression: MSE) there, on the dataset the run learns from, as
            eval.jsonl has it. What no evaluator has read yet stays too.
    """

    model_config = ConfigDict(extra="forbid")
    last: int | None = Field(None, ge=1)
    every: int | None = Field(None, ge=1)
    best: Split | None = None


def surplus(
    steps: Sequence[int], keep: Keep, newest: int, evaluated: Mapping[int, Mapping[str, Any]] | None = None
) -> list[int]:
    """Those of `steps`, ascending, that nothing in `keep` asks for; none where it asks for nothing.

    Args:
        newest: the step just written, which stays. Those above it go: the run has gone back over them and takes them again.
        evaluated: metrics per task of the checkpoints that an evaluator has read.
    """
    if keep == Keep():
        return []
    behind = [step for step in steps if step <= newest]
    wanted = {newest, *(behind[-keep.last :] if keep.last else [])}
    wanted |= {step for step in behind if keep.every and step % keep.every == 0}
    if keep.best:
        read = {step: metrics for step, metrics in (evaluated or {}).items() if step in behind}
        wanted |= {*behind} - read.keys() | best(read)
    return [step for step in steps if step not in wanted]


def best(evaluated: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """For each task the step of its lowest NE, or MSE where it is a regression; of equal ones the first."""
    figures: dict[str, list[tuple[float, int]]] = {}
    for step, metrics in evaluated.items():
        for task, measured in metrics.items():
            value = measured["ne"] if "ne" in measured else measured["mse"]
            if value is not None:
                figures.setdefault(task, []).append((value, step))
    return {min(found)[1] for found in figures.values()}


def prune(run: Run, keep: Keep, dataset: str, newest: int) -> None:
    """Deletes the surplus, except what somebody reads at the moment: that is left for the next time.

    Args:
        dataset: name of the one that the run learns from; what was measured on others says nothing of which is best.
        newest: the step just written.
    """
    try:
        found = records.current(run, keep.best, str(Path(dataset).absolute())) if keep.best else {}
        read = {step: record["metrics"] for step, record in found.items()}
        for step in surplus(checkpoint.steps(run.checkpoints), keep, newest, read):
            checkpoint.remove(checkpoint.folder(run.checkpoints, step))
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # of a damaged record
        print(f"{run.checkpoints}: old checkpoints are not deleted: {error}", file=sys.stderr, flush=True)
