"""The loader of a run's batches, from its settings."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice

import torch
import torch.distributed as dist

from features.batch import Batch
from features.schema.schema import Split
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.decoding import processes_of
from pipeline.dataset.loader import Loader, Position, StoreGoneError
from pipeline.dataset.read_ahead import Reading
from pipeline.dataset.shards import table_sizes
from pipeline.training.config import Settings

logger = logging.getLogger(__name__)


def loader_of(
    s: Settings, dataset: Dataset, split: Split, rank: int, ranks: int, device: torch.device, alone: bool = True
) -> Loader:
    """One rank's loader of a split, for batches on a device.

    Args:
        alone: it is the only loader of this rank; another one, beside it, makes do with one decoding process.
    Raises:
        UserError: as Loader.
    """
    order, processes = s.order(), processes_of(s.decode_workers, device)
    processes = processes if alone else min(processes, 1)
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * max(processes, 1)
    reading = Reading(s.read_ahead_bytes, s.cache, s.cache_bytes, on_host)
    loader = Loader(
        dataset, split, order.batch_size, order.lanes, s.seed, rank, ranks, window=order.window,
        max_corrupt=s.max_corrupt if s.corrupt == "skip" else 0, table_sizes=table_sizes(dataset),
        workers=processes, device=device, reading=reading,
    )  # fmt: skip
    if rank == 0 and processes > (lanes := len(loader.shares)):
        logger.info(
            f"{lanes} decoding processes a rank, not {processes}: each of {ranks} ranks reads {lanes} of {order.lanes} lanes. "
            "More need train.lanes, of a new run."
        )
    return loader


def agreed(
    loader: Loader, position: Position, count: int, group: dist.ProcessGroup | None, stop: Callable[[], None]
) -> Iterator[Batch]:
    """The next `count` batches, the first of them once every rank has its own.

    Args:
        group: as `why_gone`. stop: called on every rank, between two steps, where one cannot have its first batch.
    """
    batches = islice(loader.batches(position), count)
    if loader.stored is None:
        yield from batches
        return
    first = None
    with suppress(StoreGoneError):  # which `loader.gone` is
        first = next(batches, None)
    if why_gone(loader, group):
        stop()
    if first is not None:
        yield first
        yield from batches


def why_gone(loader: Loader, group: dist.ProcessGroup | None) -> str | None:
    """Why some rank cannot read the dataset, None where all can. Every rank calls it.

    Args:
        group: a CPU process group of all ranks; None for a single rank.
    """
    ours = str(loader.gone) if loader.gone else None
    if group is None:
        return ours
    found = [ours] * dist.get_world_size(group)
    dist.all_gather_object(found, ours, group=group)
    return next((why for why in found if why), None)
