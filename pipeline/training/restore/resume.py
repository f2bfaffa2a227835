"""Resuming: the newest undamaged checkpoint of a run, and whether this job could have written it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.checkpoint.manifest import UnreadableError
from pipeline.run.run import Run
from pipeline.training.config import Order, Settings

logger = logging.getLogger(__name__)


def newest(run: Run, below: int | None = None) -> Path | None:
    """The newest checkpoint whose files fit its manifest; damaged ones are logged. Every rank calls it.

    The ranks share the reading. Rank 0 lists the folder: ranks must not choose differently. One that cannot be read now is
    not passed over: going on from an older one would drop lines and checkpoints of the steps after it.

    Args:
        below: only of steps less than this.
    Raises:
        UnreadableError: on every rank, where one cannot read a checkpoint that may be whole.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    listed = [checkpoint.steps(run.checkpoints) if rank == 0 else None]
    dist.broadcast_object_list(listed)
    for step in reversed([step for step in listed[0] or [] if below is None or step < below]):
        path = checkpoint.folder(run.checkpoints, step)
        faults: list[UserError | None] = [None] * ranks
        dist.all_gather_object(faults, _fault(path, rank, ranks))
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return path
        if unreadable := next((fault for fault in faults if isinstance(fault, UnreadableError)), None):
            raise unreadable
        if rank == 0:
            logger.warning(f"skipped a checkpoint: {fault}")
    return None


def _fault(path: Path, rank: int, ranks: int) -> UserError | None:
    try:
        checkpoint.check(path, rank, ranks)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(str(error))
    return None


def as_begun(settings: Settings, run: Run) -> Settings:
    """The settings with the order of rows that their run began with, or begins with now. Every rank calls it.

    Raises:
        UserError: settings of another order than that of the run's checkpoints.
    """
    ranks = dist.get_world_size()
    found: list[tuple[Path, Order] | None] = [_order(run) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    order = settings.order(ranks)
    if found[0] is not None:
        path, begun = found[0]
        for name, value in begun.settings().items():
            if (written := getattr(settings, name)) not in (None, value):
                raise UserError(_other(path, f"train.{name}", value, written))
        if settings.rank_batch_size and order.batch_size != begun.batch_size and dist.get_rank() == 0:
            logger.info(
                f"train.batch_size stays {begun.batch_size}, as the run began; train.rank_batch_size="
                f"{settings.rank_batch_size} on {ranks} ranks would be {order.batch_size}"
            )
        order = begun
    return settings.model_copy(update=order.settings() | {"rank_batch_size": None})


def _order(run: Run) -> tuple[Path, Order] | None:
    """Of the newest checkpoint whose manifest is whole. Raises UnreadableError."""
    for step in reversed(checkpoint.steps(run.checkpoints)):
        path = checkpoint.folder(run.checkpoints, step)
        try:
            manifest = checkpoint.read(path)
        except UnreadableError:
            raise
        except UserError:
            continue
        order = Order(manifest.batch_size, len(manifest.cursors), manifest.window)
        if all(order):
            return path, order
    return None


def _other(path: Path, what: str, theirs: object, ours: object) -> str:
    return f"{path} has {what} {theirs}, this job has {ours}. Use the same, or another run=."


def check_compatible(path: Path, manifest: CheckpointManifest, ours: CheckpointManifest) -> None:
    """Raises UserError where a checkpoint is of another model, or of rows in another order, than this job would write."""
    for what, name in (
        ("schema", "fingerprint"),
        ("model and optimisers", "config"),
        ("train.seed", "seed"),
        ("train.window", "window"),
        ("train.batch_size", "batch_size"),
        ("train rows", "data"),
        ("encoders", "encoders"),
    ):
        if getattr(manifest, name) != getattr(ours, name):
            raise UserError(_other(path, what, getattr(manifest, name), getattr(ours, name)))
    if len(manifest.cursors) != len(ours.cursors):
        raise UserError(_other(path, "train.lanes", len(manifest.cursors), len(ours.cursors)))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> list[str]:
    """The settings that differ, as `train.dense.lr 0.001 -> 0.002`."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, f"{place}{key}.")
        elif old != new:
            found.append(f"{place}{key} {old} -> {new}")
    return found
