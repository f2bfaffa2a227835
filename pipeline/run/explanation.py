"""What an explanation of a checkpoint holds, and its file RUN/explain/SPLIT-STEP.json."""

# Shapes: T tasks.

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.plain_json import Count, read_json, validated
from features.schema.schema import Split
from pipeline.run.run import Run
from pipeline.storage.files import make_folder, write_json

MAX_BYTES = 64 << 20
Name = Annotated[str, Field(max_length=1000)]
Names = Annotated[list[Name], Field(max_length=10_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rise(_Strict):
    """How much a task's figure rises.

    Attributes:
        value: null where undefined. se: its standard error, paired by bucket. low, high: the two-sided interval.
    """

    value: Number | None
    se: Number | None
    low: Number | None
    high: Number | None


class Importance(_Strict):
    """Of a feature, or of several that are permuted together.

    Attributes:
        name: of the feature or the group. features: those that are permuted. tasks: the rise of each task's figure.
    """

    name: Name
    features: Names
    tasks: Annotated[dict[Name, Rise], Field(max_length=1000)]


class TaskFigure(_Strict):
    """A task's headline metric on the sample as it is: its name in eval.jsonl and its value, null where undefined, and why."""

    metric: Name
    value: Number | None
    why: Name = ""


Row = Annotated[list[Number | None], Field(max_length=1000)]
Matrix = Annotated[list[Row], Field(max_length=1000)]


class Affinity(_Strict):
    """What a step on one task's loss does to another's (pipeline.evaluation.explain.affinity).

    Attributes:
        tasks: of rows and columns. batches: how many, of batch_rows rows. dense_rate, table_rate: learning rates of the step.
        z_TT: 1 - loss after / loss before of the column's task, after a step on the row's. se_TT: standard errors over batches.
    """

    tasks: Names
    batches: Count
    batch_rows: Count
    dense_rate: Number
    table_rate: Number
    z_TT: Matrix
    se_TT: Matrix

    @model_validator(mode="after")
    def _every_task_by_every_task(self) -> "Affinity":
        if any([len(row) for row in x_TT] != [len(self.tasks)] * len(self.tasks) for x_TT in (self.z_TT, self.se_TT)):
            raise ValueError(f"z_TT and se_TT are not both of {len(self.tasks)} by {len(self.tasks)} tasks")
        return self


class Explanation(_Strict):
    """What a checkpoint rests on.

    Attributes:
        run, step, checkpoint (checksum of its manifest), dataset (see Dataset.name), split, rows, share (of the clusters),
            cluster (the key whose rows share a bucket, or row), buckets: which model, on which rows.
        permutations, seed, confidence: how.
        figures: of each task. importance: the features and groups, those with the largest mean rise over tasks first.
        affinity: null where it was not asked for.
    """

    run: Name
    step: Count
    checkpoint: Name
    dataset: Name
    split: Split
    rows: Count
    share: Share
    cluster: Name
    buckets: Count
    permutations: Count
    seed: int
    confidence: Annotated[float, Field(gt=0, lt=1)]
    figures: Annotated[dict[Name, TaskFigure], Field(max_length=1000)]
    importance: Annotated[list[Importance], Field(max_length=10_000)]
    affinity: Affinity | None


def path(run: Run, split: str, step: int) -> Path:
    """Where the explanation of a checkpoint is kept."""
    return run.path / "explain" / f"{split}-{step:08d}.json"


def write(explanation: Explanation, run: Run) -> Path:
    """Writes the file atomically and returns its path."""
    file = path(run, explanation.split, explanation.step)
    make_folder(file.parent)
    write_json(file, explanation.model_dump(mode="json"))
    return file


def read(run: Run, split: str, step: int) -> Explanation | None:
    """What `write` wrote, None where there is none. Raises UserError for a link, and for a file of another form."""
    file = path(run, split, step)
    try:
        content = read_json(run.path, f"explain/{file.name}", MAX_BYTES)
    except FileNotFoundError:
        return None
    return validated(Explanation, content, file)
