"""Follows a run: evaluates checkpoints as they are committed and appends each one's metrics to eval.jsonl, once.

A checkpoint is what its manifest's checksum says: where a run went back and wrote the same step anew, that is another one.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.errors import UserError
from features.schema.schema import Split
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.evaluation import oracle, predictions
from pipeline.evaluation.oracle import Truth, best_path
from pipeline.evaluation.scorer import Evaluator
from pipeline.run import checkpoint, records
from pipeline.run.run import Run
from pipeline.storage.files import append_line, write_json

POLL_SECONDS = 0.5


class EvaluateConfig(BaseModel):
    """Settings of jobs.evaluate; see jobs/conf/evaluate.yaml."""

    model_config = ConfigDict(extra="forbid")
    run: Path
    split: Split = "test"
    dataset: Path | None = None
    days: str | None = None
    step: int | list[int] | Literal["all", "newest"] = "all"
    predictions: bool = False
    follow: bool = False
    give_up_after: float = Field(600, gt=0)
    batch_size: int = Field(8192, ge=1)
    threads: int | None = Field(None, ge=1)
    truth: Truth | None = None

    @model_validator(mode="after")
    def _following_sees_all(self) -> "EvaluateConfig":
        if self.follow and self.step != "all":
            raise ValueError("follow=true evaluates every checkpoint: leave step out")
        return self


def evaluate(config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """Evaluates a run's checkpoints in order and yields each record once it is in eval.jsonl.

    With `follow` it starts before or during training and ends with it. It only ever reads what the trainer writes.

    Raises:
        UserError: bad input; or, following, a trainer that has said nothing for `give_up_after` seconds.
    """
    run = Run(config.run)
    if config.follow:
        os.nice(10)  # the trainer comes first
        _wait_for(run, config.give_up_after)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // (2 if config.follow else 1)))
    dataset = dataset_of(run, config)
    evaluator = Evaluator(run, dataset, config.split, config.batch_size)
    with run.lock(config.split, f"another evaluator is at work on split {config.split}"):
        if config.truth:
            best = {"dataset": dataset.name, "metrics": oracle.best(evaluator, config.truth)}
            write_json(best_path(run, config.split), best)
        known = records.latest(run, config.split, dataset.name)
        seen = {step: record.get("checkpoint") for step, record in known.items()}
        failed: dict[int, str] = {}
        for step in _steps(run, config):
            current, rows = records.checksum(run, step), predictions.path(run, config.split, step)
            kept = not config.predictions or predictions.are_of(rows, evaluator.source(current))
            if seen.get(step) == current and kept:
                continue
            try:
                record = evaluator.evaluate(step, config.predictions)
            except (UserError, OSError) as error:
                if not config.follow:
                    raise
                if failed.get(step) != str(error):  # it may yet be written again, by a trainer that went back
                    print(f"step {step}: left out, its checkpoint was deleted or damaged ({error})", flush=True)
                failed[step] = str(error)
                continue
            if seen.get(step) != record["checkpoint"]:
                append_line(run.eval_metrics, record)
            seen[step] = record["checkpoint"]
            yield record


def dataset_of(run: Run, config: EvaluateConfig) -> Dataset:
    """The rows that are evaluated on: of another dataset, of other days, or those the run was trained on. Raises UserError."""
    trained_on = run.config()
    days = config.days or (None if config.dataset else trained_on.get("days"))
    return open_dataset((config.dataset or Path(trained_on["dataset"])).absolute(), days)


def _steps(run: Run, config: EvaluateConfig) -> Iterator[int]:
    """Steps to evaluate: those asked for, or, following, every one as it appears until the run has ended."""
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
        status = run.status()  # before the listing: what is committed by the end is then in it
        yield from checkpoint.steps(run.checkpoints)
        if status and status.state == "finished":
            return
        # A trainer that failed may be started again, by torchrun, a cluster or a person.
        if status and time.time() - status.time > config.give_up_after:
            if status.state == "failed":
                raise UserError(f"{run.path}: training failed at step {status.step} and was not started again.")
            raise UserError(
                f"{run.path}: the trainer has said nothing for {config.give_up_after:.0f} s. Is it still there?"
            )
        time.sleep(POLL_SECONDS)


def _wait_for(run: Run, seconds: float) -> None:
    begin = time.monotonic()
    while not (run.path / "config.yaml").exists() or not (run.path / "schema.yaml").exists():
        if time.monotonic() - begin > seconds:
            raise UserError(f"{run.path}: no run appeared within {seconds:.0f} s. Start jobs.train run={run.path}.")
        time.sleep(POLL_SECONDS)
