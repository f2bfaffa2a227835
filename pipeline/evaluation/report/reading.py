"""A run's files as the model of a page: its records, its figures by slice, its training, its configuration."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from features.errors import UserError
from features.plain_json import first_fault
from features.regular_files import lstat_regular
from pipeline.dataset.card.page import page_of
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.evaluation.report.content import Model, TrainLine
from pipeline.evaluation.report.results import Results
from pipeline.run import explanation
from pipeline.run.explanation import Explanation
from pipeline.storage.files import read_lines
from pipeline.storage.store_path import on_store

MAX_LINES = 4000  # of train.jsonl that are kept, evenly spread
RATES = ("lr", "rows_per_s", "data_wait")
Loss = Annotated[float, Field(allow_inf_nan=True)]


class _Line(BaseModel):
    """What is read of a line of train.jsonl or progressive.jsonl; it has more."""

    rows: Annotated[int, Field(ge=0)]
    ne: dict[str, Loss | None] = {}
    task_loss: dict[str, Loss | None] = {}
    lr: Loss | None = None
    rows_per_s: Loss | None = None
    data_wait: Loss | None = None


def model_of(results: Results) -> Model:
    """The model of a run's results, whose records `pipeline.run.records` has checked. Raises UserError for a damaged file."""
    run = results.run
    return Model(
        name=run.path.resolve().name,
        split=results.split,
        dataset=results.dataset,
        kinds=results.kinds,
        records=results.records,
        evaluated=figures_of(results),
        best=results.oracle,
        training=train_lines(run.train_metrics),
        progressive=train_lines(run.progressive),
        config=run.config() if (run.path / "config.yaml").exists() else {},
        card=card_link(run.report, results.dataset),
        facts=[("folder", str(run.path))],
        explanation=explanation_of(results),
    )


def figures_of(results: Results) -> Evaluated | None:
    """All figures of the newest record's checkpoint; None where they were not kept, or are of another checkpoint.

    Raises:
        UserError: the file is damaged, or a link.
    """
    if not results.records:
        return None
    last = results.records[-1]
    if not (name := last.get("evaluation")):
        return None
    file = results.run.path / "evaluations" / name
    if lstat_regular(file.parent, file.name) is None:
        return None
    found = evaluated.read(file)
    return found if found.provenance.checkpoint == last.get("checkpoint") else None


def explanation_of(results: Results) -> Explanation | None:
    """What jobs.explain found of the newest record's checkpoint on the same rows; None where it did not.

    Raises:
        UserError: the file is damaged, or a link.
    """
    if not results.records or results.split == "all":
        return None
    last = results.records[-1]
    found = explanation.read(results.run, results.split, last["step"])
    return found if found and (found.checkpoint, found.dataset) == (last.get("checkpoint"), results.dataset) else None


def train_lines(path: Path) -> list[TrainLine]:
    """Lines of train.jsonl or progressive.jsonl, thinned out evenly. Raises UserError for a line of another form."""
    lines = list(_lines(path))
    return lines[:: 1 + len(lines) // MAX_LINES]


def _lines(path: Path) -> Iterator[TrainLine]:
    for number, content in enumerate(read_lines(path), 1):
        try:
            line = _Line.model_validate(content, strict=True)
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: not one of training ({first_fault(error)}). Remove it.") from None
        known = {name: value for name in RATES if (value := getattr(line, name)) is not None and abs(value) < 1e100}
        yield TrainLine(line.rows, line.ne, line.task_loss, known)


def card_link(report: Path, dataset: str) -> str | None:
    """A relative link from a report to the page that jobs.inspect wrote of a dataset (its name); None where there is none."""
    try:
        file = page_of(dataset)
        if on_store(file) != on_store(report) or not file.is_file():
            return None
        return f"./{quote(os.path.relpath(str(file), str(report.parent.resolve())))}"
    except (OSError, ValueError):  # no path at all
        return None
