"""The records of eval.jsonl: a line for each evaluation of a checkpoint.

Several evaluators append to it. Each holds a lock for the moment in which it reads the file once more and adds its line, so
that an evaluation (split, dataset, share, step and checksum of the checkpoint) has one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, field_validator

from features.errors import UserError
from features.plain_json import first_fault
from pipeline.run import checkpoint
from pipeline.run.checkpoint.manifest import UnreadableError
from pipeline.run.run import Run
from pipeline.storage.files import append_line, json_text, read_lines, write_text
from pipeline.storage.local import remove_leftovers
from pipeline.storage.store_path import on_store
from pipeline.storage.versions import replace_version, version

LARGEST = 1e100  # of a metric: what is near the largest float cannot be drawn
MOST_BUCKETS = 1 << 20
Weights = Annotated[list[FiniteFloat], Field(min_length=1, max_length=4096)]  # of a unit's experts
Value = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Levels = Annotated[list[Annotated[list[Weights], Field(max_length=1024)]], Field(max_length=64)]
Bins = Annotated[list[Annotated[list[Value | None], Field(min_length=4, max_length=5)]], Field(max_length=1024)]
FileName = Annotated[str, Field(pattern=r"^[a-z]{1,20}-[0-9]{8,20}(-[0-9a-f]{8})?\.parquet$")]
Natural = Annotated[int, Field(ge=0, le=1 << 53)]
Seconds = Annotated[FiniteFloat, Field(ge=0)]
IDENTITY = ("split", "dataset", "share", "step", "checkpoint")  # of an evaluation: one line each
LOCK = "eval"  # of Run.lock, around a change of eval.jsonl


class Lag(BaseModel):
    """How far an evaluation was behind its trainer when it was recorded, see pipeline.evaluation.lag."""

    steps: Natural
    seconds: Seconds | None = None


Names = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=4096)]


class GateNames(BaseModel):
    """Names of a level's units and experts, in the order of its gates."""

    units: Names
    experts: Names


class Sketch(BaseModel):
    """AUC of rounded logits: the bound on its error, and the share of clusters that intervals and slices are of."""

    sketch: Value
    share: Annotated[float, Field(gt=0, le=1)]


class Record(BaseModel):
    """What every line must have, or may; `Scorer.evaluate` writes more, which only people read.

    Attributes:
        checkpoint: its manifest's checksum; lines of early versions have none, and are evaluated again.
        dataset: see Dataset.name, with its whole path.
        metrics: task → metric → value, None where it is undefined.
        rows: seen in training. gates: mean weights by level, unit and expert; None of a model without gates.
        gate_names: of these units and experts.
        share: of the split's clusters that was scored; lines of early versions have none, and are of all.
        cluster, buckets: what intervals are computed from. A record with them has a file of all figures, `evaluation`, in
            RUN/evaluations. group: the key within which GAUC and NDCG rank.
        measure: hash of the settings that it was measured with; lines of early versions have none, and are evaluated again.
        intervals: task → metric → standard error. buckets_used: how many of the buckets have rows of it.
        reliability: task → bins of [mean prediction, mean label, its standard error, weight, how many buckets have rows of it].
        rows_evaluated, rows_per_s, ranks: of the evaluation. ranking: "exact", or how AUC was approximated.
    """

    step: Natural
    checkpoint: str | None = None
    split: str
    dataset: str
    metrics: dict[str, dict[str, Value | None]]
    rows: Natural | None = None
    gates: Levels | None = None
    gate_names: Annotated[list[GateNames], Field(max_length=64)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    group: str | None = None
    cluster: str | None = None
    buckets: Annotated[int, Field(ge=1, le=MOST_BUCKETS)] | None = None
    measure: Annotated[str, Field(max_length=64)] | None = None
    evaluation: FileName | None = None
    intervals: dict[str, dict[str, Value | None]] | None = None
    buckets_used: dict[str, dict[str, Annotated[int, Field(ge=0, le=MOST_BUCKETS)]]] | None = None
    reliability: dict[str, Bins] | None = None
    lag: Lag | None = None
    rows_evaluated: Natural | None = None
    rows_per_s: Seconds | None = None
    ranks: Annotated[int, Field(ge=1)] | None = None
    ranking: Literal["exact"] | Sketch | None = None
    seconds: Value | None = None
    time: Value | None = None

    @field_validator("gates")
    @classmethod
    def _as_many_weights_in_each_unit(cls, gates: Levels | None) -> Levels | None:
        if any(len({len(unit) for unit in level}) != 1 for level in gates or []):
            raise ValueError("units of a level have unlike numbers of experts, or there are none")
        return gates


def latest(run: Run, split: str, dataset: str, share: float = 1.0) -> dict[int, dict[str, Any]]:
    """The record of each step on a split of a dataset, in order of step.

    Of several the last: after a rollback the run has trained the step anew, and it was evaluated again.

    Args:
        dataset: its name (see Dataset.name), with its whole path.
        share: of the split that was scored.
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
        if (record.split, record.dataset, record.share) == (split, dataset, share):
            found[record.step] = line
    return dict(sorted(found.items()))


def put(run: Run, record: dict[str, Any]) -> None:
    """Adds a record as the last line of eval.jsonl, in place of the one that its evaluation may have.

    Raises:
        UserError: a line is damaged.
    """
    with run.wait_for_lock(LOCK):
        remove_leftovers(run.eval_metrics)
        if on_store(run.eval_metrics):
            _put_object(run.eval_metrics, record)
            return
        lines = list(read_lines(run.eval_metrics))
        others = [line for line in lines if _identity(line) != _identity(record)]
        if len(others) < len(lines):
            write_text(run.eval_metrics, "".join(json_text(line) + "\n" for line in [*others, record]))
        else:
            append_line(run.eval_metrics, record)


def _put_object(file: Path, record: dict[str, Any]) -> None:
    """As `put`, where a lease may have ended unnoticed: the file is written only while it is what was read."""
    while True:
        known = version(file)
        lines = [line for line in read_lines(file) if _identity(line) != _identity(record)]
        try:
            replace_version(file, "".join(json_text(line) + "\n" for line in [*lines, record]).encode(), known)
            return
        except FileExistsError:
            continue


def _identity(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(key, 1.0 if key == "share" else None) for key in IDENTITY)


def checksum(run: Run, step: int) -> str:
    """The checksum of a step's checkpoint as it is now, by which a record names it; empty where it is damaged or missing.

    Raises:
        UnreadableError: its store does not answer.
    """
    try:
        return checkpoint.read(checkpoint.folder(run.checkpoints, step)).checksum
    except UnreadableError:
        raise
    except UserError:
        return ""


def current(run: Run, split: str, dataset: str, share: float = 1.0) -> dict[int, dict[str, Any]]:
    """As `latest`, but only records of checkpoints as they are now. Raises UserError."""
    found = latest(run, split, dataset, share)
    return {step: record for step, record in found.items() if record.get("checkpoint") == checksum(run, step)}
