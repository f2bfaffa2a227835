"""The records of eval.jsonl: a line for each evaluation of a checkpoint."""

from typing import Annotated, Any, Literal

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


Whole = Annotated[int, Field(ge=0, le=1 << 53)]
Bin = Annotated[list[Value | None], Field(min_length=4, max_length=4)]


class Lag(BaseModel):
    """How far an evaluation was behind its trainer."""

    steps: Whole
    seconds: Value


class Sketch(BaseModel):
    """AUC of rounded logits: the bound on its error."""

    sketch: Value


class Record(BaseModel):
    """What every line must have, or may; `Scorer.evaluate` writes more, which only people read.

    Attributes:
        checkpoint: its manifest's checksum; lines of early versions have none, and are evaluated again.
        dataset: see Dataset.name, with its whole path.
        metrics: task → metric → value, None where it is undefined.
        rows: seen in training. gates: mean weights by level, unit and expert; None of a model without gates.
        gate_names: of these units and experts.
        intervals: task → metric → standard error, by buckets of rows that share a value of the cluster.
        reliability: task → bins of mean prediction, mean label, its standard error, weight.
        evaluation: the file in RUN/evaluations with the figures of all slices.
        Lines of early versions lack all from gate_names on.
    """

    step: Annotated[int, Field(ge=0)]
    checkpoint: str | None = None
    split: str
    dataset: str
    metrics: dict[str, dict[str, Value | None]]
    rows: Annotated[int, Field(ge=0)] | None = None
    gates: Levels | None = None
    gate_names: Annotated[list[GateNames], Field(max_length=64)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    cluster: str | None = None
    buckets: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    intervals: dict[str, dict[str, Value | None]] | None = None
    reliability: dict[str, Annotated[list[Bin], Field(max_length=1000)]] | None = None
    lag: Lag | None = None
    rows_evaluated: Whole | None = None
    rows_per_s: Value | None = None
    ranks: Annotated[int, Field(ge=1)] | None = None
    ranking: Literal["exact"] | Sketch | None = None
    evaluation: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.parquet$", max_length=200)] | None = None
    seconds: Value | None = None
    time: Value | None = None

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
