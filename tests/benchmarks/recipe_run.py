"""One run of the study of recipes: trained in this process and scored on the test split, beside the truth where it is known.

`python recipe_run.py` is a worker: it reads jobs as JSON lines and answers each with one, so that Python, torch and the
other libraries are loaded once for many runs.
"""

# Shapes: B rows, T tasks.

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import polars as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from features.batch import Batch
from jobs.command_line import CONF
from jobs.entry import bound_resolvers, configure_logging, parse
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.oracle import Truth
from pipeline.evaluation.scorer import Scorer
from pipeline.overrides import setting
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.config import TrainConfig
from pipeline.training.train import train

# One checkpoint, at the end: others would only be written and removed.
FIXED = ("train.threads=1", "train.checkpoint_every=1000000000", "train.checkpoint_async=false")


class DatasetSpec(NamedTuple):
    """A data set of the study.

    Attributes:
        data: group of jobs/conf/data.
        generate: the job and its arguments that write the raw log; none for the census.
        train: settings that every variant starts from.
    """

    data: str
    generate: tuple[str, ...]
    train: tuple[str, ...]


SIX = ("jobs.generate", "impressions=300000", "extra_tasks=3", "event_rates=[0.06,0.015,0.003]")
DATASETS = {
    "demo": DatasetSpec("demo", ("jobs.generate",), ("recipe=demo",)),
    "six_tasks": DatasetSpec("six_tasks", SIX, ("recipe=demo",)),
    "hard": DatasetSpec("six_tasks", (*SIX, "noise=0.3", "task_correlation=0"), ("recipe=demo",)),
    "census": DatasetSpec("census", (), ("recipe=census",)),
    "ratings": DatasetSpec(
        "ratings", ("jobs.generate_ratings", "ratings=200000", "users=1886"), ("recipe=demo", "train.epochs=5")
    ),
}


def composed(job: str, overrides: Sequence[str]) -> DictConfig:
    """A job's configuration as its command line makes it."""
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        return compose(job, overrides=[*overrides])


def configuration(dataset: Path, run: Path, overrides: Sequence[str], seed: int) -> TrainConfig:
    """Of jobs.train. Raises UserError, or an error of Hydra, for overrides that it does not have."""
    own = [setting("dataset", dataset), setting("run", run), f"train.seed={seed}", *FIXED]
    settings: TrainConfig = parse(composed("train", [*overrides, *own]), TrainConfig)
    settings.dataset = settings.dataset.absolute()
    return settings


def truth_of(name: str, data: Path) -> Truth | None:
    """Where the truth of a data set below the folder `data` lies; None where it is not known."""
    given = [f"data={DATASETS[name].data}", setting("data.input", data / name / "raw"), "run=none"]
    found = composed("evaluate", given).data.get("truth")
    return Truth.model_validate(OmegaConf.to_container(found, resolve=True)) if found else None


def trained_and_scored(
    dataset: Path, folder: Path, overrides: Sequence[str], seed: int, truth: Truth | None
) -> dict[str, Any]:
    """Trains a run in `folder`, which is removed at the end, and scores its last checkpoint on the test split.

    Returns: step, metrics by task (with gap, where the truth is known), and seconds of training, of the clock and the CPU.
    """
    shutil.rmtree(folder, ignore_errors=True)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    run: Run = train(configuration(dataset, folder, overrides, seed))
    spent = {"seconds": round(time.perf_counter() - begin, 1), "cpu": round(time.process_time() - begin_cpu, 1)}
    scorer = Scorer(run, Dataset(dataset), "test", 8192)
    step = checkpoint.steps(run.checkpoints)[-1]
    scored: list[tuple[Batch, Tensor]] = []
    metrics, _ = scorer.metrics(step, lambda batch, logit_BT: scored.append((batch, logit_BT)))
    by_task: Mapping[str, dict[str, Any]] = metrics.compute()
    if truth:
        for task, gap in gaps(scored, scorer.tasks, truth).items():
            by_task[task]["gap"] = gap
    shutil.rmtree(folder)
    return {"step": step, "metrics": by_task, **spent}


def gaps(scored: Sequence[tuple[Batch, Tensor]], tasks: Sequence[tuple[str, str]], truth: Truth) -> dict[str, float]:
    """The share of the gap closed, by task: see `gap_closed`."""
    logit_BT, observed_BT, weight_BT = (
        torch.cat(parts)
        for parts in zip(*((logit_BT, b.observed_BT, b.weight_BT) for b, logit_BT in scored), strict=True)
    )
    rows = pl.DataFrame({truth.key: torch.cat([batch.row_id_B for batch, _ in scored]).numpy()})
    rows = rows.join(pl.read_parquet(truth.file), on=truth.key, how="left", maintain_order="left")
    found = {}
    for t, (name, kind) in enumerate(tasks):
        weight_B = weight_BT[:, t].double() * observed_BT[:, t]
        true_B = rows[truth.columns[name]].to_torch().double()
        found[name] = gap_closed(kind, logit_BT[:, t].double(), true_B, weight_B)
    return found


def gap_closed(kind: str, predicted_B: Tensor, true_B: Tensor, weight_B: Tensor) -> float:
    """Share of the way from the base rate to the truth that a model has gone, its loss taken in expectation over the labels.

    (loss of the base rate - loss of the model) / (loss of the base rate - loss of the truth), of log loss or, for regression,
    squared error: 1 is the truth, 0 its mean, less than 0 worse than that. Without the chance of the labels, even models of
    a task with a hundred positives can be compared.

    Args:
        predicted_B: logits; of regression the predictions. true_B: probabilities; of regression the means.
        weight_B: 0 of rows that are not observed.
    """
    seen_B = weight_B > 0
    predicted_B, true_B, weight_B = predicted_B[seen_B], true_B[seen_B], weight_B[seen_B] / weight_B.sum()
    base = (weight_B * true_B).sum()
    if kind == "regression":
        losses = [(weight_B * (y - true_B) ** 2).sum() for y in (base, predicted_B, true_B)]
    else:
        softplus = torch.nn.functional.softplus
        logits = (base.logit(), predicted_B, true_B.logit())
        losses = [(weight_B * (softplus(z) - true_B * z)).sum() for z in logits]
    of_base, of_model, of_truth = (float(loss) for loss in losses)
    return (of_base - of_model) / (of_base - of_truth)


def work() -> None:
    """Answers jobs from stdin; its end, or that of the process that writes there, ends the worker, a job at work too.

    A job that fails ends the worker after its answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    bound_resolvers()
    configure_logging("warning")
    jobs: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        job = json.loads(jobs.get())
        truth = Truth.model_validate(job["truth"]) if job["truth"] else None
        try:
            found = trained_and_scored(Path(job["path"]), Path(job["run"]), job["overrides"], job["seed"], truth)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
            raise  # with its traceback in the log; what it leaves behind in this process could change the next run
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    work()
