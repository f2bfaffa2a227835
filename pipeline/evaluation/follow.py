"""Follows a run: evaluates checkpoints as they are committed and appends each one's record to eval.jsonl, once.

A checkpoint is identified by its manifest's checksum: after a rollback the same step is another checkpoint.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from features.errors import UserError
from features.schema.schema import Split
from models.table_storage import Precision
from pipeline import cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import Days, MissingDays
from pipeline.evaluation import oracle, predictions
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.oracle import Truth
from pipeline.evaluation.report.results import Results, check_complete
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.weights import Loading, Shard, Tables
from pipeline.run import checkpoint, records
from pipeline.run.run import Run
from pipeline.storage.files import append_line

POLL_INTERVAL = 0.5  # seconds

logger = logging.getLogger(__name__)


class EvaluateConfig(MeasureConfig):
    """Settings of jobs.evaluate; see jobs/conf/evaluate.yaml."""

    run: Path
    split: Split | Literal["all"] = "test"
    dataset: Path | None = None
    days: Days = None
    missing_days: MissingDays | None = None
    step: int | list[int] | Literal["all", "newest"] = "all"
    predictions: bool = False
    follow: bool = False
    give_up_after: float = Field(600, gt=0)
    batch_size: int = Field(8192, ge=1)
    threads: int | None = Field(None, ge=1)
    tables: Tables = "all"
    table_precision: Precision = "fp32"
    truth: Truth | None = None
    compare: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    compare_slices: Annotated[int, Field(ge=0, le=10_000)] | list[str] = 10

    @model_validator(mode="after")
    def _following_takes_every_step(self) -> "EvaluateConfig":
        if self.follow and self.step != "all":
            raise ValueError("follow=true evaluates every checkpoint: leave step out")
        return self


class Evaluation:
    """A run's checkpoints on one split of one dataset. It only reads what the trainer writes.

    With `follow` it first waits for the run to be created.

    Args:
        shard: splits the work over the ranks of the process group (pipeline.evaluation.weights.Loading).
    Raises:
        UserError: bad input; no run within `give_up_after` seconds.
    """

    def __init__(self, config: EvaluateConfig, shard: Shard | None = None) -> None:
        self.config, self.run = config, Run(config.run)
        if config.follow:
            os.nice(10)  # the trainer comes first
            _wait_for_run(self.run, config.give_up_after)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (2 if config.follow else 1)
        torch.set_num_threads(config.threads or max(1, cores.available() // processes))
        dataset, loading = dataset_of(self.run, config), Loading(config.tables, config.table_precision, shard)
        self.scorer = Scorer(self.run, dataset, config.split, config.batch_size, config, loading)
        self.known: dict[int, dict[str, Any]] = {}

    def records(self) -> Iterator[dict[str, Any]]:
        """Evaluates the checkpoints in order and yields each record once it is in eval.jsonl; `follow` ends with training.

        Raises:
            UserError: a damaged checkpoint; or, following, no heartbeat of the trainer for `give_up_after` seconds.
        """
        config, run, scorer = self.config, self.run, self.scorer
        with run.lock(config.split, f"another evaluator is at work on split {config.split}"):
            if config.truth:
                oracle.write(scorer, config.truth)
            self.known = records.latest(run, config.split, scorer.dataset.name)
            failed: dict[int, str] = {}
            for step in _steps(run, config):
                current, file = records.checksum(run, step), predictions.path(run, config.split, step)
                complete = not config.predictions or predictions.is_from(file, scorer.provenance(current))
                if self._evaluated(step) == current and complete:
                    continue
                try:
                    record = scorer.evaluate(step, config.predictions)
                except (UserError, OSError) as error:
                    if not config.follow:
                        raise
                    if failed.get(step) != str(error):  # a rollback may write it anew
                        logger.warning("step %s: left out, its checkpoint was deleted or damaged (%s)", step, error)
                    failed[step] = str(error)
                    continue
                if self._evaluated(step) != record["checkpoint"]:
                    append_line(run.eval_metrics, record)
                    self.known[step] = record
                yield record

    def results(self) -> Results:
        """All that is known of the split by now, for reports. Raises UserError for a record that lacks a metric."""
        name = self.scorer.dataset.name
        known = [record for _, record in sorted(self.known.items())]
        check_complete(known, dict(self.scorer.tasks), self.run)
        return Results(
            self.run,
            self.config.split,
            name,
            dict(self.scorer.tasks),
            known,
            oracle.read(self.run, self.config.split, name, dict(self.scorer.tasks)),
        )

    def _evaluated(self, step: int) -> str | None:
        """Checksum of the checkpoint that a step's record is of."""
        return self.known.get(step, {}).get("checkpoint")


def evaluate(config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """The new records of an `Evaluation`. Raises UserError."""
    yield from Evaluation(config).records()


def dataset_of(run: Run, config: EvaluateConfig) -> Dataset:
    """The dataset to evaluate on: another one, other days, or the one the run was trained on. Raises UserError."""
    trained_on = run.config()
    days = config.days or (None if config.dataset else trained_on.get("days"))
    inherited: MissingDays = trained_on.get("missing_days", "refuse") if days and not config.days else "refuse"
    missing_days = config.missing_days or inherited
    return open_dataset((config.dataset or Path(trained_on["dataset"])).absolute(), days, missing_days)


def _steps(run: Run, config: EvaluateConfig) -> Iterator[int]:
    """Steps to evaluate: those of the configuration, or, following, every one as it is committed until the run ends."""
    if not config.follow:
        found = checkpoint.steps(run.checkpoints)
        wanted = {"all": found, "newest": found[-1:]}[config.step] if isinstance(config.step, str) else config.step
        wanted = [wanted] if isinstance(wanted, int) else wanted
        if not found or set(wanted) - set(found):
            words = f"step {', '.join(map(str, wanted))}" if wanted else "any"
            raise UserError(f"{run.checkpoints}: no checkpoint ({words}); there are {found or 'none'}")
        yield from wanted
        return
    while True:
        status = run.status()  # before the listing, which then has all that was committed by the end
        yield from checkpoint.steps(run.checkpoints)
        if status and status.state == "finished":
            return
        # A trainer that failed may be restarted, by torchrun, a cluster or a person.
        if status and time.time() - status.time > config.give_up_after:
            if status.state == "failed":
                raise UserError(f"{run.path}: training failed at step {status.step} and was not restarted")
            raise UserError(f"{run.path}: no trainer heartbeat for {config.give_up_after:.0f} s; is it running?")
        time.sleep(POLL_INTERVAL)


def _wait_for_run(run: Run, seconds: float) -> None:
    begin = time.monotonic()
    while not (run.path / "config.yaml").exists() or not (run.path / "schema.yaml").exists():
        if time.monotonic() - begin > seconds:
            raise UserError(f"{run.path}: no run appeared within {seconds:.0f} s. Start jobs.train run={run.path}.")
        time.sleep(POLL_INTERVAL)
