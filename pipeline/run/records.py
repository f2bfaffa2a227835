"""The records of eval.jsonl: a line for each evaluation of a checkpoint."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, field_validator

from features.errors import UserError
from features.plain_json import first_fault
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import read_lines

LARGEST = 1e100  # of a metric: what is near the largest float cannot be drawn
Weights = Annotated[list[FiniteFloat], Field(min_length=1, max_length=4096)]  # of a unit's experts
Value = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Levels = Annotated[list[Annotated[list[Weights], Field(max_length=1024)]], Field(max_length=64)]

Names = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=4096)]


class GateNames(BaseModel):
    """Names of a level's units and experts, in the order of its gates."""

    units: Names
    experts: Names


class Record(BaseModel):
    """What every line must have; `Scorer.evaluate` writes more, which only people and reports read.

    Attributes:
        checkpoint: its manifest's checksum; lines of early versions have none, and are evaluated again.
        dataset: see Dataset.name, with its whole path.
        metrics: task → metric → value, None where it is undefined.
        rows: seen in training. gates: mean weights by level, unit and expert; None of a model without gates.
        gate_names: of these units and experts; lines of early versions have none.
    """

    step: Annotated[int, Field(ge=0)]
    checkpoint: str | None = None
    split: str
    dataset: str
    metrics: dict[str, dict[str, Value | None]]
    rows: Annotated[int, Field(ge=0)] | None = None
    gates: Levels | None = None
    gate_names: Annotated[list[GateNames], Field(max_length=64)] | None = None

    @field_validator("gates")
    @classmethod
    def _as_many_weights_in_each_unit(cls, gates: Levels | None) -> Levels | None:
        if any(len({len(unit) for unit in level}) != 1 for level in gates or []):
            raise ValueError("units of a level have unlike numbers of experts, or there are none")
        return gates


def latest(run: Run, split: str, dataset: str) -> dict[int, dict[str, Any]]:
    """The record of each step on a split of a dataset, in order of step.

    Of several the last: after a rollback the run has trained the step anew, and it was evaluated again.

    Args:
        dataset: its name (see Dataset.name), with its whole path.
    Raises:
        UserError: a line is damaged.
    """
    found = {}
    for number, line in enumerate(read_lines(run.eval_metrics), 1):
        try:
            record = Record.model_validate(line, strict=True)
        except ValidationError as error:
            raise UserError(
                f"{run.eval_metrics}, line {number}: not a record of an evaluation ({first_fault(error)}). Remove it: its "
                "checkpoint is evaluated again."
            ) from None
        if (record.split, record.dataset) == (split, dataset):
            found[record.step] = line
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
