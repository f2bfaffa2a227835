"""The records of eval.jsonl: a line for each evaluation of a checkpoint."""

from typing import Any

from pydantic import BaseModel

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import read_lines


class Record(BaseModel):
    """What every line must have; `Scorer.evaluate` writes more, which only people and reports read.

    Attributes:
        checkpoint: its manifest's checksum; lines of early versions have none, and are evaluated again.
        dataset: see Dataset.name, with its whole path.
        metrics: task → metric → value, None where it is undefined.
    """

    step: int
    checkpoint: str | None = None
    split: str
    dataset: str
    metrics: dict[str, dict[str, float | None]]


def latest(run: Run, split: str, dataset: str) -> dict[int, dict[str, Any]]:
    """The record of each step on a split of a dataset, in order of step.

    Of several the last: after a rollback the run has trained the step anew, and it was evaluated again.

    Args:
        dataset: its name (see Dataset.name), with its whole path.
    Raises:
        UserError: a line is damaged.
    """
    found = {}
    try:
        for line in read_lines(run.eval_metrics):
            record = Record.model_validate(line, strict=True)
            if (record.split, record.dataset) == (split, dataset):
                found[record.step] = line
    except ValueError:  # not JSON, or not a Record
        raise UserError(
            f"{run.eval_metrics}: a line is not a record of an evaluation. Remove it: its checkpoint is evaluated again."
        ) from None
    return dict(sorted(found.items()))


def checksum(run: Run, step: int) -> str:
    """The checksum of a step's checkpoint as it is now, by which a record names it; empty where it cannot be read."""
    try:
        return checkpoint.read(checkpoint.folder(run.checkpoints, step)).checksum
    except UserError:
        return ""


def current(run: Run, split: str, dataset: str) -> dict[int, dict[str, Any]]:
    """As `latest`, but only records of checkpoints as they are now. Raises UserError."""
    found = latest(run, split, dataset)
    return {step: record for step, record in found.items() if record.get("checkpoint") == checksum(run, step)}
