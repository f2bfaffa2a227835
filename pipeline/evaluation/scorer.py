"""The evaluator: reads checkpoints as they are committed and appends each one's metrics to eval.jsonl, once.

A checkpoint is what its manifest's checksum says: where a run went back and wrote the same step anew, that is another one.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from features.batch import Batch
from features.errors import UserError
from features.schema.schema import Split
from models.emm import build_ranker
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset, open_dataset, write_json
from pipeline.dataset.loader import Loader
from pipeline.evaluation import predictions
from pipeline.evaluation.expert_weights import GateMeans
from pipeline.evaluation.metrics.metrics import Metrics
from pipeline.run import records
from pipeline.run.checkpoint import checkpoint
from pipeline.run.run import Run, append_line

POLL_SECONDS = 0.5


class Truth(BaseModel):
    """Where the true probabilities of a generated log are.

    Attributes:
        file: Parquet. key: its column that equals row_id. columns: per task, its probability (regression: its mean).
    """

    model_config = ConfigDict(extra="forbid")
    file: Path
    key: str
    columns: dict[str, str]


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


class Evaluator:
    """A run's model on one split of a dataset, without a process group and without sharding.

    Args:
        run: whose checkpoints. dataset: whose rows; must have the run's schema. split: of it. batch_size: rows at a time.
    Raises:
        UserError: no run, or a dataset of another schema.
    """

    def __init__(self, run: Run, dataset: Dataset, split: Split, batch_size: int) -> None:
        self.run, self.split = run, split
        self.dataset = dataset = dataset.only(run.config().get("tasks"))
        self.schema = run.schema()
        dataset.expect(self.schema.fingerprint, f"the run {run.path}")
        self.tasks = [(name, task.kind) for name, task in self.schema.tasks.items()]
        self.loader = Loader(dataset, split, batch_size)
        model = ModelConfig.model_validate(run.config()["model"])
        self.ranker = build_ranker(self.schema, dataset.encoders, model, device="cpu").eval()

    @torch.inference_mode()
    def metrics(
        self, step: int, see: Callable[[Batch, Tensor], None] | None = None
    ) -> tuple[Metrics, checkpoint.CheckpointManifest]:
        """A checkpoint's metrics on the split, and its manifest.

        Args:
            see: called with every batch and its logit_BT.
        Raises:
            UserError: it is not whole, or was trained on rows that other encoders made.
        """
        path = checkpoint.folder(self.run.checkpoints, step)
        with checkpoint.reading(path) as manifest:
            if manifest.encoders != self.dataset.encoders_id:
                raise UserError(
                    f"{self.dataset.path} was encoded with {self.dataset.encoders_id}, {path} trained with "
                    f"{manifest.encoders}: its ids mean something else. Run jobs.preprocess with encoders.from=DATASET, the "
                    "one it was trained on."
                )
            checkpoint.load(path, {"model": self.ranker.state_dict()}, alone=True)
        metrics = Metrics(self.tasks)
        for batch in self.loader.batches(self.loader.start()):
            logit_BT = self.ranker(batch)
            metrics.update(logit_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
            if see:
                see(batch, logit_BT)
        return metrics, manifest

    def evaluate(self, step: int, keep_rows: bool = False) -> dict[str, Any]:
        """One checkpoint's record: step, its checksum, rows (seen in training), split, seconds, metrics per task, mean gate
        weights.

        Args:
            keep_rows: write each row's prediction (pipeline.evaluation.predictions).
        Raises:
            UserError: as `metrics`.
        """
        begin = time.perf_counter()
        frames: list[pl.DataFrame] = []

        def see(batch: Batch, logit_BT: Tensor) -> None:
            gates.update(batch)
            if keep_rows:
                frames.append(predictions.frame(batch, logit_BT, self.schema))

        with GateMeans(self.ranker.fusion) as gates:
            metrics, manifest = self.metrics(step, see)
        if keep_rows:
            source = self.source(manifest.checksum)
            predictions.write(frames, predictions.path(self.run, self.split, step), source)
        return {
            "step": step,
            "checkpoint": manifest.checksum,
            "rows": manifest.rows,
            "split": self.split,
            "dataset": self.dataset.name,
            "time": time.time(),
            "seconds": time.perf_counter() - begin,
            "metrics": metrics.compute(),
            "gates": gates.means(),
        }

    def source(self, checksum: str) -> dict[str, str]:
        """What predictions are of."""
        return {"checkpoint": checksum, "dataset": self.dataset.name}

    def best(self, truth: Truth) -> dict[str, dict[str, float | int | None]]:
        """Metrics of the true probabilities on the same rows: what no model can beat but by luck. Raises UserError."""
        try:
            known = pl.read_parquet(truth.file, columns=list({truth.key, *truth.columns.values()}))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{truth.file}: cannot be read: {str(error).splitlines()[0]}") from None
        metrics = Metrics(self.tasks)
        for batch in self.loader.batches(self.loader.start()):
            rows = pl.DataFrame({truth.key: batch.row_id_B.numpy()}).join(
                known, on=truth.key, how="left", maintain_order="left"
            )
            columns = [
                torch.from_numpy(rows[truth.columns[name]].fill_null(float("nan")).to_numpy(writable=True))
                for name, _ in self.tasks
            ]
            logit_BT = torch.stack(
                [
                    c.double().logit(eps=1e-15) if kind == "binary" else c
                    for c, (_, kind) in zip(columns, self.tasks, strict=True)
                ],
                1,
            )
            metrics.update(logit_BT, batch.label_BT, batch.observed_BT, batch.weight_BT)
        return metrics.compute()


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
            best = {"dataset": dataset.name, "metrics": evaluator.best(config.truth)}
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


def best_path(run: Run, split: Split) -> Path:
    """Where the metrics of the true probabilities are kept."""
    return run.eval_metrics.with_name(f"best-{split}.json")


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
