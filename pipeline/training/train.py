"""Training a run: from the process group to the last checkpoint."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist

from features.errors import Preempted
from features.schema.schema import Schema
from pipeline import cores
from pipeline.dataset.dataset import open_dataset
from pipeline.run.run import Run
from pipeline.run.tracking import registry as tracking
from pipeline.training.architecture_file import resolved
from pipeline.training.arithmetic import arithmetic
from pipeline.training.config import TrainConfig
from pipeline.training.faults.hang_watch import RESUMES, watch_ranks
from pipeline.training.faults.preemption import exiting_at_start
from pipeline.training.observer import Observer
from pipeline.training.parallel import process_group
from pipeline.training.restore import emm_sources, resume
from pipeline.training.trainer import Trainer


def train(
    config: TrainConfig,
    schema: Schema | None = None,
    observers: Sequence[Observer] = (),
    kind: type[Trainer] = Trainer,
) -> Run:
    """Trains a run to its end, from its newest undamaged checkpoint where it has one.

    Args:
        config: all settings.
        schema: if given, the dataset must have been written for it.
        observers: called as the run proceeds.
        kind: of its trainer.
    Raises:
        UserError: bad input, a loss that is not finite, or a lost rank.
        Preempted: by SIGTERM, after a checkpoint.
    """
    with arithmetic(config.train):
        return _trained(config, schema, observers, kind)


def _trained(config: TrainConfig, schema: Schema | None, observers: Sequence[Observer], kind: type[Trainer]) -> Run:
    trainer = watch = None
    try:
        with exiting_at_start(log=os.environ.get("RANK", "0") == "0"):
            if os.environ.get("RANK", "0") == "0":
                tracking.check(config)
            device = process_group.start(config.train.timeout)
            watch = watch_ranks(config.train.timeout)  # a rank may be cut off in start-up too
            trainer = prepare(config, schema, device, observers, kind)
            trainer.watch = watch
        run = trainer.run_to_end()
        watch.stop()
        dist.destroy_process_group()
        return run
    except BaseException as error:
        ended = isinstance(error, (Preempted, SystemExit))
        if trainer is not None and trainer.rank == 0 and not ended and not trainer.owner.is_lost:
            trainer.run.write_status("failed", trainer.state.step, trainer.steps)
        said = None
        if isinstance(error, RuntimeError):
            where = f"step {trainer.state.step + 1}: " if trainer else "at the start: "
            said = process_group.explained(error, where, RESUMES)
        if watch:
            watch.stop(said or error)
        if dist.is_initialized() and (dist.get_world_size() == 1 or ended):
            dist.destroy_process_group()  # other ranks would see the connection break before this one has raised
        elif said:
            raise said from None
        raise


def prepare(
    config: TrainConfig,
    schema: Schema | None,
    device: torch.device,
    observers: Sequence[Observer] = (),
    kind: type[Trainer] = Trainer,
) -> "Trainer":
    """A trainer whose run is restored, ready for `run_to_end`. Every rank calls it. Raises UserError."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.train.threads or max(1, cores.available() // local))
    whole = open_dataset(config.dataset, config.days, config.missing_days)
    if schema is not None:
        whole.check_compatible(schema.fingerprint, "the schema of this job")
    dataset = whole.only(config.tasks)
    with ExitStack() as pinned:  # checkpoints of other runs that this one starts from
        config = resolved(emm_sources.resolve(config, dataset, pinned))
        config = config.model_copy(update={"train": resume.as_begun(config.train, Run(config.run))})
        trainer = kind(config, dataset, device, observers)
        try:
            trainer.restore(whole.schema, pinned)
        except BaseException:
            trainer.owner.close()  # whoever goes on in this process may train the run again
            raise
    return trainer
