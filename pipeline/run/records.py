"""What eval.jsonl holds: a line for each evaluation of a checkpoint."""

from typing import Any

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import read_lines


def latest(run: Run, split: str, dataset: str) -> dict[int, dict[str, Any]]:
    """The record of each step on a split of a dataset, in order of step.

    Of several the last: a run that went back has trained the step anew, and it was evaluated again.

    Args:
        dataset: its name (see Dataset.name), with its whole path.
    Raises:
        UserError: the file is damaged.
    """
    try:
        ours = [r for r in read_lines(run.eval_metrics) if (r["split"], r["dataset"]) == (split, dataset)]
        return {record["step"]: record for record in sorted(ours, key=lambda record: record["step"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{run.eval_metrics}: a line is no record of an evaluation. Remove it: what it was about is evaluated again."
        ) from None


def checksum(run: Run, step: int) -> str:
    """That of the checkpoint of a step as it is now, by which a record names it; the empty text where none can be read."""
    try:
        return checkpoint.read(checkpoint.folder(run.checkpoints, step)).checksum
    except UserError:
        return ""


def current(run: Run, split: str, dataset: str) -> dict[int, dict[str, Any]]:
    """As `latest`, but only those that are of a checkpoint as it is now. Raises UserError."""
    found = latest(run, split, dataset)
    return {step: record for step, record in found.items() if record.get("checkpoint") == checksum(run, step)}
