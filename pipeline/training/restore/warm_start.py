"""Warm start: another run's weights, where a run has no checkpoint of its own yet."""

import logging
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from features.errors import UserError
from features.fit import reuse
from models.ranker import Ranker, is_table, table_of
from pipeline.dataset.dataset import Dataset
from pipeline.run import checkpoint
from pipeline.run.run import Run

logger = logging.getLogger(__name__)


def from_rank_0(find: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank; its UserError too. Every rank calls it."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [find()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def start(run: Run, dataset: Dataset, ranker: Ranker, model: dict[str, Tensor], pinned: ExitStack) -> str:
    """Takes the weights of another run, but not its optimisers or its task weighting. Every rank calls it.

    Args:
        model: the tensors to fill, by name. pinned: keeps the other run's checkpoint from deletion until it is closed.
    Returns: a line about what was taken.
    Raises:
        UserError: as `newest` and `load`.
    """
    path = newest(run, dataset, "train.init_from", pinned, grown=True)
    weights = {name: tensor for name, tensor in model.items() if not name.startswith("loss.")}
    shapes = {name: tuple(tensor.size()) for name, tensor in weights.items()}
    missing = load(path, weights, from_rank_0(lambda: changed_tensors(run, path, dataset, ranker, shapes)))
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"starts from {path}" + (f"; started fresh: {', '.join(missing[:3])}{more}" if missing else "")


def changed_tensors(
    run: Run, path: Path, dataset: Dataset, ranker: Ranker, shapes: dict[str, tuple[int, ...]]
) -> set[str]:
    """Which tensors of a model, given by their shapes, mean something else in `dataset` than in a checkpoint of `run`.

    These are the tables whose ids are others, and what reads the features, unless all of them are the same in the same order.
    """
    if checkpoint.read(path).encoders == dataset.encoders_id:
        return set()
    schema, known = dataset.schema, run.schema()
    tables, same = schema.all_tables.keys() - set(dataset.encoders.kept_tables), reuse.unchanged(schema, known).features
    same_inputs = list(schema.features) == list(known.features) == [name for name in known.features if name in same]
    changed = set()
    for name, shape in shapes.items():
        if is_table(name) or name.startswith("managed."):
            other = table_of(name) in tables
        else:
            other = not same_inputs and ranker.reads_features(name, shape)
        changed |= {name} if other else set()
    return changed


def newest(
    run: Run, dataset: Dataset, setting: str, pinned: ExitStack, step: int | None = None, grown: bool = False
) -> Path:
    """The newest undamaged checkpoint of `run`, or that of `step`, whose inputs mean what they mean in `dataset`.

    With `grown` it is enough that encoders of the dataset were kept of those the run was trained with. Every rank calls it, and
    reads its share of the files.

    Damaged ones are logged. The run may continue meanwhile and prune its old ones: not this one, before `pinned` is closed.

    Raises:
        UserError: naming `setting`, where there is none or other encoders made its rows.
    """
    found = from_rank_0(lambda: checkpoint.steps(run.checkpoints))
    if not found:
        raise UserError(f"{setting}: {run.path} has no checkpoint. Train it first, or name another run.")
    if step is not None and step not in found:
        raise UserError(f"{setting}: {run.path} has no checkpoint of step {step}, there are {found}")
    path, theirs = _whole(run, setting, pinned) if step is None else _pinned(run, step, pinned)
    if theirs != dataset.encoders_id and not (grown and theirs == dataset.encoders.kept_from):
        raise UserError(
            f"{setting}: {run.path} was trained on rows of encoders {theirs}, {dataset.path} has {dataset.encoders_id}: its "
            "ids mean something else. Run jobs.preprocess with encoders.from=DATASET, the one it was trained on."
        )
    return path


def _whole(run: Run, setting: str, pinned: ExitStack) -> tuple[Path, str]:
    tried: set[int] = set()
    while left := set(from_rank_0(lambda: checkpoint.steps(run.checkpoints))) - tried:  # newer ones may have come
        try:
            return _pinned(run, max(left), pinned)
        except UserError as error:
            if dist.get_rank() == 0:
                logger.warning(f"{setting}: skipped a checkpoint: {error}")
            tried.add(max(left))
    raise UserError(f"{setting}: every checkpoint of {run.path} is damaged. Train it again, or name another run.")


def _pinned(run: Run, step: int, pinned: ExitStack) -> tuple[Path, str]:
    """A checkpoint that is whole, and its encoders. Raises UserError on every rank, if one finds a fault."""
    path, rank, ranks = checkpoint.folder(run.checkpoints, step), dist.get_rank(), dist.get_world_size()
    encoders, found = "", None
    with ExitStack() as locked:
        try:
            encoders = locked.enter_context(checkpoint.reading(path, rank, ranks)).encoders
        except UserError as error:
            found = str(error)
        except OSError as error:
            found = f"{path}: cannot be read: {error.strerror} ({error.filename})"
        faults: list[str | None] = [None] * ranks
        dist.all_gather_object(faults, found)
        if fault := next(filter(None, faults), None):
            raise UserError(fault)
        pinned.push(locked.pop_all())
    return path, encoders


def load(path: Path, model: dict[str, Tensor], changed: Collection[str] = ()) -> list[str]:
    """Fills the tensors of `model` that a checkpoint has too, in the same shape and on any number of ranks.

    Args:
        changed: names of tensors that are left as they are.
    Returns: the names of those that it has not.
    Raises:
        UserError: none fits.
    """
    theirs = checkpoint.shapes(path)
    fitting: dict[str, Any] = {
        n: t for n, t in model.items() if n not in changed and theirs.get(f"model.{n}") == tuple(t.size())
    }
    if not fitting:
        raise UserError(
            f"{path}: none of its {len(theirs)} tensors fits this model. Start from a run of a similar model."
        )
    checkpoint.load(path, {"model": fitting})
    return sorted(model.keys() - fitting.keys())
