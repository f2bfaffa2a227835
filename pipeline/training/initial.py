"""Weights to start from: another run's, where a run has no checkpoint of its own yet."""

from pathlib import Path
from typing import Any

from torch import Tensor

from features.errors import UserError
from pipeline import checkpoint
from pipeline.dataset import Dataset
from pipeline.run import Run


def newest(run: Run, dataset: Dataset, setting: str, step: int | None = None) -> Path:
    """The newest checkpoint of `run`, or that of `step`, checked, whose inputs mean what they mean in `dataset`.

    Raises:
        UserError: naming `setting`, where there is none or other encoders made its rows.
    """
    found = checkpoint.steps(run.checkpoints)
    if not found:
        raise UserError(f"{setting}: {run.path} has no checkpoint. Train it first, or name another run.")
    if step is not None and step not in found:
        raise UserError(f"{setting}: {run.path} has no checkpoint of step {step}, there are {found}")
    path = checkpoint.folder(run.checkpoints, found[-1] if step is None else step)
    if (theirs := checkpoint.check(path).encoders) != dataset.encoders_id:
        raise UserError(
            f"{setting}: {run.path} was trained on rows of encoders {theirs}, {dataset.path} has {dataset.encoders_id}: its "
            "ids mean something else. Run jobs.preprocess with encoders.from=DATASET, the one it was trained on."
        )
    return path


def load(path: Path, model: dict[str, Tensor]) -> list[str]:
    """Fills the tensors of `model` that a checkpoint has too, in the same shape and on any number of ranks.

    Returns: the names of those that it has not.
    Raises:
        UserError: none fits.
    """
    theirs = checkpoint.shapes(path)
    fitting: dict[str, Any] = {n: t for n, t in model.items() if theirs.get(f"model.{n}") == tuple(t.size())}
    if not fitting:
        raise UserError(f"{path}: none of its {len(theirs)} tensors fits this model. Start from a run of a like model.")
    checkpoint.load(path, {"model": fitting})
    return sorted(model.keys() - fitting.keys())
