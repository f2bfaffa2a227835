"""Follows a run: evaluates checkpoints as they are committed and appends each one's record to eval.jsonl, once.

A checkpoint is identified by its manifest's checksum: after a rollback the same step is another checkpoint. The files of an
evaluation (all figures, predictions) are written before its line in eval.jsonl, each atomically. So a line has its files, and
an evaluator that is killed before the line leaves files that the next one replaces.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from features.errors import UserError, join_faults
from features.schema.schema import Split
from models.table_storage import Precision
from pipeline import cores
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import Days, MissingDays
from pipeline.evaluation import oracle, priority, ranks
from pipeline.evaluation.lag import lag
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.oracle import Truth
from pipeline.evaluation.pending import Claim, Order, Pending
from pipeline.evaluation.report.results import Results, check_complete
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.tracked import check_settings, publish, series_of, tracked, with_bounds
from pipeline.evaluation.weights import Loading, Shard, Tables
from pipeline.run import checkpoint, records
from pipeline.run.run import Run
from pipeline.run.tracking.base import EvalRecord, Published, Recorded
from pipeline.run.tracking.registry import Sinks
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.storage.store_path import Place, PlaceText, on_store, place

POLL_INTERVAL, POLL_INTERVAL_OF_STORE = 0.5, 5.0  # seconds
PAGE_EVERY, PAGE_EVERY_BEHIND = 30.0, 300.0  # seconds from a page to the next, the second while more checkpoints wait
WAIT, END = -1, -2  # instead of a step: nothing to evaluate now, or any more

logger = logging.getLogger(__name__)


class EvaluateConfig(MeasureConfig, TrackingSettings):
    """Settings of jobs.evaluate; see jobs/conf/evaluate.yaml."""

    run: Place
    split: Split | Literal["all"] = "test"
    dataset: Place | None = None
    days: Days = None
    missing_days: MissingDays | None = None
    step: int | Annotated[list[int], Field(min_length=1)] | Literal["all", "newest"] = "all"
    predictions: bool = False
    every: int = Field(1, ge=1)
    order: Order = "oldest"
    follow: bool | Literal["always"] = False
    idle: bool = True
    give_up_after: float = Field(600, gt=0)
    batch_size: int = Field(8192, ge=1)
    threads: int | None = Field(None, ge=1)
    tables: Tables = "all"
    table_precision: Precision = "fp32"
    truth: Truth | None = None
    compare: Annotated[list[PlaceText], Field(min_length=2, max_length=2)] | None = None
    compare_slices: Annotated[int, Field(ge=0, le=10_000)] | list[str] = 10

    @model_validator(mode="after")
    def _following_takes_every_step(self) -> "EvaluateConfig":
        if self.follow and self.step != "all":
            raise ValueError(f"follow={str(self.follow).lower()} evaluates every checkpoint: leave step out")
        if self.every > 1 and self.step != "all":
            raise ValueError("every chooses among all checkpoints: leave step out")
        if self.predictions and self.share < 1:
            raise ValueError("predictions are of the whole split: leave share out")
        if self.compare and (self.follow or self.predictions or self.every > 1 or self.step != "all"):
            raise ValueError(
                "compare evaluates nothing: leave step, every, predictions and follow out; RUN@STEP names a step"
            )
        return self


class Evaluation:
    """A run's checkpoints on one split of one dataset. It only reads what the trainer writes.

    Several may work on one run, each in a process of its own, or each on several ranks: see pipeline.evaluation.pending and
    pipeline.evaluation.ranks. With `follow` it first waits for the run to be created; with follow=always without a limit, and
    after a training for the run's next one.

    Args:
        shard: splits the work over the ranks of the process group (pipeline.evaluation.weights.Loading).
    Raises:
        UserError: bad input; no run within `give_up_after` seconds.
    """

    def __init__(self, config: EvaluateConfig, shard: Shard | None = None) -> None:
        self.config, self.run, self.began = config, Run(config.run), time.time()
        check_settings(config)
        if config.follow:
            priority.lower(config.idle)
            _wait_for_run(self.run, math.inf if config.follow == "always" else config.give_up_after)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (2 if config.follow else 1)
        torch.set_num_threads(config.threads or max(1, cores.available() // processes))
        dataset, loading = dataset_of(self.run, config), Loading(config.tables, config.table_precision, shard)
        self.scorer = Scorer(self.run, dataset, config.split, config.batch_size, config, loading)
        self.pending = Pending(
            self.run, config.split, self.scorer.dataset.name, config.share, self.scorer.measured,
            own_dataset=self.scorer.own_dataset, every=config.every, order=config.order, with_predictions=config.predictions,
        )  # fmt: skip
        dataset_name = None if self.scorer.own_dataset else self.scorer.dataset.name
        self.series = series_of(config.split, dataset_name, config.share)
        self.claim: Claim | None = None  # of rank 0, while its checkpoint is scored
        self.has_retried = False  # those that failed, once training had finished
        self.page_time = time.monotonic() - PAGE_EVERY  # of the last page; the first may be written at once
        self.is_on_page = True  # whether each record of this evaluation is

    def records(self, write_page: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
        """Evaluates checkpoints in `order` and yields each record, on rank 0, once it is in eval.jsonl.

        `follow` ends when training has finished and each checkpoint has its record, or is claimed by another evaluator;
        follow=always does not. It tries a damaged one again every minute, and once more at the end; it leaves out one that
        the trainer has deleted.

        Args:
            write_page: writes the run's report. It is called after a record while checkpoints are waited for, at most every
                PAGE_EVERY seconds, and every PAGE_EVERY_BEHIND seconds where they are not; the last page is the caller's.
        Raises:
            UserError: a damaged checkpoint, following only at the end; damaged rows; or, following, no heartbeat of the trainer
                for `give_up_after` seconds.
        """
        config = self.config
        if config.truth and ranks.is_first():
            oracle.write(self.scorer, config.truth)
        steps = None if config.follow else ranks.from_first(lambda: _steps(self.run, config))
        known = self.pending.known().values() if ranks.is_first() else ()
        with tracked(config, self.run, config.split, self.series, known) as sinks:
            try:
                while (step := ranks.from_first(lambda: self._next(steps))) != END:
                    if step == WAIT:
                        self._refresh(write_page, sinks, PAGE_EVERY)
                        time.sleep(_poll_interval(self.run))
                    elif record := self._evaluate(step):
                        sinks.handle(Recorded(self._known))
                        sinks.handle(EvalRecord(with_bounds(record)))
                        self.is_on_page = False
                        yield record
                        self._refresh(write_page, sinks, PAGE_EVERY_BEHIND)
            finally:
                sinks.handle(Recorded(self._known))

    def results(self) -> Results:
        """All that is known of the split by now, for reports. Raises UserError for a record that lacks a metric."""
        rows = (self.config.split, self.scorer.dataset.name)
        return _results(self.run, *rows, dict(self.scorer.tasks), self.config.share, self.pending.known())

    def publish(self) -> None:
        """Sends the report to MLflow, where the settings ask for it."""
        publish(self.config, self.run, self.config.split, self.series, self.run.report)

    def _refresh(self, write_page: Callable[[], None] | None, sinks: Sinks, seconds: float) -> None:
        """Writes a page where the last one lacks a record, if it is so old."""
        if write_page is None or self.is_on_page or time.monotonic() - self.page_time < seconds:
            return
        try:
            write_page()
            sinks.handle(Published(self.run.report))
        except (UserError, OSError) as error:
            logger.warning("%s cannot be written now: %s", self.run.report, error)
        self.page_time, self.is_on_page = time.monotonic(), True

    def _known(self) -> list[dict[str, Any]]:
        return [with_bounds(record) for record in self.pending.known().values()]

    def _next(self, steps: list[int] | None) -> int:
        """The step that was claimed, WAIT or END. Called at every poll, so that no rank waits for long.

        Args:
            steps: those to evaluate; None: whatever the run has.
        """
        config, run = self.config, self.run
        # Before the listing, which then has all that was committed by the end.
        status = run.status() if config.follow or config.every > 1 else None
        finished = status is not None and status.state == "finished"
        found = self.pending.steps()
        self.claim = self.pending.take(found if steps is None else steps, found[-1] if finished and found else None)
        if self.claim:
            return self.claim.step
        if config.follow == "always":
            return WAIT
        if finished and (failed := self.pending.failed(found)):
            if self.has_retried:
                faults = join_faults([f"step {step} ({error})" for step, error in failed.items()], 5)
                raise UserError(
                    f"{run.checkpoints}: not evaluated: {faults}. Restore or delete these checkpoints and rerun the command."
                )
            self.has_retried = True
            self.pending.retry()
            return WAIT
        if finished or not config.follow:
            return END
        # A trainer that failed may be restarted, by torchrun, a cluster or a person.
        if time.time() - (status.time if status else self.began) > config.give_up_after:
            if status and status.state == "failed":
                raise UserError(f"{run.path}: training failed at step {status.step} and was not restarted")
            raise UserError(f"{run.path}: no trainer heartbeat for {config.give_up_after:.0f} s; is it running?")
        return WAIT

    def _evaluate(self, step: int) -> dict[str, Any] | None:
        """Scores a checkpoint on all ranks and records it on rank 0; None on other ranks, and where it cannot be scored."""
        record: dict[str, Any] = {}
        error: Exception | None = None
        with self.claim or nullcontext() as claim:
            try:
                record = self.scorer.evaluate(step, self.config.predictions)
            except (UserError, OSError) as caught:
                error = caught
            if error := ranks.first_error(error):
                if not ranks.from_first(lambda: self._may_leave_out(step)):
                    raise error
                if claim:
                    self.pending.fail(claim, error)
                return None
            if claim is None:
                return None
            record["lag"] = lag(self.run, step, claim.committed)
            self.pending.record(claim, record)
            return record

    def _may_leave_out(self, step: int) -> bool:
        """Whether evaluation goes on without a checkpoint: following, a damaged one; else one that is gone and nobody named."""
        if self.config.follow:
            return self.claim is not None and self.pending.is_damaged(self.claim)
        is_gone = not checkpoint.folder(self.run.checkpoints, step).exists()
        return is_gone and isinstance(self.config.step, str)


def evaluate(config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """The new records of an `Evaluation`. Raises UserError."""
    yield from Evaluation(config).records()


def results_of(run: Run, split: str, dataset: str, kinds: Mapping[str, str], share: float = 1.0) -> Results:
    """All that is known of a split of a dataset (its name) by now. Raises UserError for a record that lacks a metric."""
    return _results(run, split, dataset, kinds, share, records.latest(run, split, dataset, share))


def _results(
    run: Run, split: str, dataset: str, kinds: Mapping[str, str], share: float, known: Mapping[int, dict[str, Any]]
) -> Results:
    check_complete(known.values(), kinds, run)
    best = oracle.read(run, split, dataset, kinds, share)
    return Results(run, split, dataset, dict(kinds), list(known.values()), best)


def dataset_of(run: Run, config: EvaluateConfig) -> Dataset:
    """The dataset to evaluate on: another one, other days, or the one the run was trained on. Raises UserError."""
    trained_on = run.config()
    days = config.days or (None if config.dataset else trained_on.get("days"))
    inherited: MissingDays = trained_on.get("missing_days", "refuse") if days and not config.days else "refuse"
    missing_days = config.missing_days or inherited
    return open_dataset((config.dataset or place(trained_on["dataset"])).absolute(), days, missing_days)


def _poll_interval(run: Run) -> float:
    return POLL_INTERVAL_OF_STORE if on_store(run.path) else POLL_INTERVAL


def _steps(run: Run, config: EvaluateConfig) -> list[int]:
    """The steps that the configuration names. Raises UserError where the run has no checkpoint of one."""
    found = checkpoint.steps(run.checkpoints)
    wanted = {"all": found, "newest": found[-1:]}[config.step] if isinstance(config.step, str) else config.step
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not found or set(wanted) - set(found):
        words = f"step {', '.join(map(str, wanted))}" if wanted else "any"
        raise UserError(f"{run.checkpoints}: no checkpoint ({words}); there are {found or 'none'}")
    return wanted


def _wait_for_run(run: Run, seconds: float) -> None:
    begin = time.monotonic()
    while not (run.path / "config.yaml").exists() or not (run.path / "schema.yaml").exists():
        if time.monotonic() - begin > seconds:
            raise UserError(f"{run.path}: no run appeared within {seconds:.0f} s. Start jobs.train run={run.path}.")
        time.sleep(_poll_interval(run))
