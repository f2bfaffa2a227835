"""Resuming: the newest undamaged checkpoint of a run, and whether this job could have written it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest
from pipeline.run.run import Run

logger = logging.getLogger(__name__)


def newest(run: Run, below: int | None = None) -> Path | None:
    """The newest checkpoint whose files fit its manifest; damaged ones are logged. Every rank calls it.

    The ranks share the reading. Rank 0 lists the folder: ranks must not choose differently.

    Args:
        below: only of steps less than this.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    listed = [checkpoint.steps(run.checkpoints) if rank == 0 else None]
    dist.broadcast_object_list(listed)
    for step in reversed([step for step in listed[0] or [] if below is None or step < below]):
        path = checkpoint.folder(run.checkpoints, step)
        faults: list[str | None] = [None] * ranks
        dist.all_gather_object(faults, _fault(path, rank, ranks))
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return path
        if rank == 0:
            logger.warning(f"skipped a checkpoint: {fault}")
    return None


def _fault(path: Path, rank: int, ranks: int) -> str | None:
    try:
        checkpoint.check(path, rank, ranks)
    except (UserError, OSError) as error:
        return str(error)
    return None


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
            theirs, this = getattr(manifest, name), getattr(ours, name)
            raise UserError(f"{path} has {what} {theirs}, this job has {this}. Use the same, or another run=.")
    if len(manifest.cursors) != len(ours.cursors):
        raise UserError(
            f"{path} has train.lanes {len(manifest.cursors)}, this job has {len(ours.cursors)}. Use the same, or another run=."
        )


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
