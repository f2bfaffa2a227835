"""The evaluations of two checkpoints, as they were written: the input of jobs.evaluate's compare."""

import re
from pathlib import Path
from typing import NamedTuple

from features.errors import UserError
from pipeline.evaluation.follow import EvaluateConfig, dataset_of
from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.metrics.evaluated import Evaluated, Provenance
from pipeline.evaluation.report import comparison_table
from pipeline.run import checkpoint, records
from pipeline.run.run import Run


class Compared(NamedTuple):
    """A checkpoint of a run; step None: the newest."""

    run: Path
    step: int | None


def parse_compared(text: str) -> Compared:
    """`RUN` or `RUN@STEP`."""
    found = re.fullmatch(r"(.+)@(\d{1,18})", text)
    return Compared(Path(found[1]), int(found[2])) if found else Compared(Path(text), None)


def comparison(config: EvaluateConfig) -> str:
    """The paired table of the two checkpoints of `compare`, on the split, dataset and share of the settings.

    Raises:
        UserError: one of them has not been evaluated there, or is another checkpoint by now; they were evaluated on other rows.
    """
    assert config.compare
    ours, theirs = (_read(parse_compared(text), config) for text in config.compare)
    kinds = {name: task.kind for name, task in Run(parse_compared(config.compare[0]).run).schema().tasks.items()}
    return comparison_table.table(ours, theirs, kinds, config.compare_slices)


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
    file = evaluated.path(run, wanted, dataset.path == Path(run.config()["dataset"]).absolute())
    given = [f"run={run.path}", f"split={config.split}", f"step={step}"]
    given += [f"dataset={config.dataset}"] if config.dataset else []
    given += [f"share={config.share}"] if config.share < 1 else []
    command = f"python -m jobs.evaluate {' '.join(given)}"
    if not file.exists():
        raise UserError(f"{run.path}: step {step} has not been evaluated ({file} is missing). Run {command}.")
    found = evaluated.read(file)
    if wanted.checkpoint and found.provenance.checkpoint != wanted.checkpoint:
        raise UserError(f"{file} is of a checkpoint that was since replaced. Run {command}.")
    return found
