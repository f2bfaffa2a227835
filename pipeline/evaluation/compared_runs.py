"""The evaluations of two checkpoints, as they were written, side by side: jobs.evaluate's compare."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from features.errors import UserError
from pipeline.evaluation.follow import EvaluateConfig, dataset_of, results_of
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.evaluation.metrics.slice_names import covers
from pipeline.evaluation.report import comparison_table
from pipeline.evaluation.report.content import Model
from pipeline.evaluation.report.reading import card_link, model_of
from pipeline.evaluation.scorer import is_own_dataset
from pipeline.overrides import setting
from pipeline.run import checkpoint, records
from pipeline.run.run import Run
from pipeline.storage.store_path import place

ROWS = ("dataset", "split", "share")  # of a provenance: which rows were asked for


class Compared(NamedTuple):
    """A checkpoint of a run; step None: the newest."""

    run: Path
    step: int | None


class Comparison(NamedTuple):
    """Two checkpoints side by side: the paired table as text, the models of a page, ours and theirs, and the page's file."""

    table: str
    models: tuple[Model, Model]
    file: Path


def parse_compared(text: str) -> Compared:
    """`RUN` or `RUN@STEP`."""
    found = re.fullmatch(r"(.+)@(\d{1,18})", text)
    return Compared(place(found[1]), int(found[2])) if found else Compared(place(text), None)


def comparison(config: EvaluateConfig) -> Comparison:
    """The two checkpoints of `compare`, on the split, dataset and share of the settings; nothing is written.

    Raises:
        UserError: one of them has not been evaluated there, or is another checkpoint by now; they were evaluated on other rows.
    """
    assert config.compare
    named = [parse_compared(text) for text in config.compare]
    ours, theirs = (_read(one, config) for one in named)
    our_run, their_run = (Run(one.run) for one in named)
    if isinstance(config.compare_slices, list):
        _check_slices(config.compare_slices, ours, theirs)
    kinds, their_kinds = _kinds(our_run), _kinds(their_run)
    table = comparison_table.table(ours, theirs, kinds, config.compare_slices)
    shared = {task: kind for task, kind in kinds.items() if their_kinds.get(task) == kind}
    name = f"{config.split}-{ours.provenance.step:08d}-{their_run.path.resolve().name[:100]}-{theirs.provenance.step:08d}.html"
    file = our_run.path / "comparisons" / name
    models = _model(our_run, ours, shared, file), _model(their_run, theirs, shared, file)
    return Comparison(table, models, file)


def _model(run: Run, found: Evaluated, kinds: Mapping[str, str], file: Path) -> Model:
    of = found.provenance
    model = model_at(run, of.step, of.split, of.dataset, kinds, file, of.share)
    if model.last.get("checkpoint") != of.checkpoint:
        raise UserError(
            f"{run.eval_metrics}: the record of step {of.step} is of another checkpoint. Evaluate it again."
        )
    return replace(model, name=f"{model.name}@{of.step}", evaluated=found)


def _kinds(run: Run) -> dict[str, str]:
    return {name: task.kind for name, task in run.schema().tasks.items()}


def model_at(
    run: Run, step: int, split: str, dataset: str, kinds: Mapping[str, str], file: Path, share: float = 1.0
) -> Model:
    """The model of a page as it was at a checkpoint: its record, those before it, and the training up to it.

    Args:
        file: of the page. dataset: its name. kinds: of the tasks that the page shows. share: of the split that was scored.
    Raises:
        UserError: the checkpoint has no record, or a file of the run is damaged.
    """
    results = results_of(run, split, dataset, kinds, share)
    known = [record for record in results.records if record["step"] <= step]
    if not known or known[-1]["step"] != step:
        raise UserError(f"{run.eval_metrics}: no record of step {step} on {split}. Run jobs.evaluate on it again.")
    found, rows = model_of(replace(results, records=known)), known[-1]["rows"]
    training, progressive = (
        [line for line in lines if line.rows <= rows] for lines in (found.training, found.progressive)
    )
    return replace(found, training=training, progressive=progressive, card=card_link(file, dataset))


def _check_slices(wanted: list[str], ours: Evaluated, theirs: Evaluated) -> None:
    """Raises UserError for a dimension or pattern that no slice of both has."""
    one, other = (set(found.figures.select("dimension", "slice").unique().iter_rows()) for found in (ours, theirs))
    for pattern in wanted:
        if not any(covers([pattern], *of) for of in one & other):
            known = ", ".join(sorted({dimension for dimension, _ in one & other} - {evaluated.ALL})) or "none"
            raise UserError(
                f"compare_slices: the two have no slice {pattern} in common. Dimensions that both have: {known}. Run "
                "jobs.evaluate on both with the same slices=[...]."
            )


def _read(of: Compared, config: EvaluateConfig) -> Evaluated:
    run = Run(of.run)
    dataset = dataset_of(run, config)
    steps = checkpoint.steps(run.checkpoints)
    if of.step is None and not steps:
        raise UserError(f"{run.checkpoints}: no checkpoint. Name one that was evaluated: {run.path}@STEP.")
    step = steps[-1] if of.step is None else of.step
    wanted = Provenance(
        run=str(run.path), step=step, checkpoint=records.checksum(run, step), dataset=dataset.name, split=config.split,
        share=config.share,
    )  # fmt: skip
    file = evaluated.path(run, wanted, is_own_dataset(run, dataset))
    given = [setting("run", run.path), f"split={config.split}", f"step={step}"]
    given += [setting("dataset", config.dataset)] if config.dataset else []
    given += [f"days=[{config.days}]"] if config.days else []
    given += [f"missing_days={config.missing_days}"] if config.missing_days else []
    given += [f"share={config.share}"] if config.share < 1 else []
    given += [f"share_by={config.share_by}"] if config.share_by else []
    command = f"python -m jobs.evaluate {shlex.join(given)}"
    if not file.exists():
        raise UserError(f"{run.path}: step {step} has not been evaluated ({file} is missing). Run {command}.")
    found = evaluated.read(file)
    if wanted.checkpoint and found.provenance.checkpoint != wanted.checkpoint:
        raise UserError(f"{file} is of a checkpoint that was since replaced. Run {command}.")
    if other := [key for key in ROWS if getattr(found.provenance, key) != getattr(wanted, key)]:
        raise UserError(f"{file} is of another {' and '.join(other)} than asked for. Run {command}.")
    return found
