"""What the training of a run has cost, from its own records."""

from typing import Annotated

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt

from features.plain_json import validated
from pipeline.run.run import Run
from pipeline.storage.files import read_lines


class _Line(BaseModel):
    """What is read of a line of train.jsonl; rows_per_s is of all rows since the line before, those left out too."""

    rows: NonNegativeInt
    left_out: NonNegativeInt = 0
    rows_per_s: Annotated[FiniteFloat, Field(ge=0)]
    time: FiniteFloat = 0.0


def core_hours(run: Run) -> float:
    """Hours of training times ranks: over the lines of train.jsonl, rows since the line before / rows_per_s * ranks / 3600.

    Time without training (start, checkpoints) is not in it, nor are steps that a resumed run has repeated.

    Raises:
        UserError: a damaged line of train.jsonl or restarts.jsonl.
    """
    starts, seconds, before = run.starts(), 0.0, 0
    for content in read_lines(run.train_metrics):
        line = validated(_Line, content, run.train_metrics)
        ranks = next((start.ranks for start in reversed(starts) if start.time <= line.time), 1)
        rows = line.rows + line.left_out
        if line.rows_per_s:
            seconds += (rows - before) / line.rows_per_s * ranks
        before = rows
    return seconds / 3600
