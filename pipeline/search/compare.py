"""Trains and evaluates the runs of a comparison: each model on each seed, and trees. Complete runs are not repeated."""

import logging
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from features.errors import UserError
from features.plain_json import first_fault, read_json, validated
from features.regular_files import lstat_regular, refuse_link
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import predictions
from pipeline.evaluation.follow import EvaluateConfig, dataset_of
from pipeline.evaluation.model_cost import model_cost
from pipeline.evaluation.report.results import check_complete, is_complete
from pipeline.evaluation.scorer import Scorer
from pipeline.evaluation.trees import TREES
from pipeline.overrides import setting
from pipeline.run import checkpoint, records
from pipeline.run.headline import RANKING
from pipeline.run.run import Run
from pipeline.search.comparison import SHARES, Entry
from pipeline.storage.files import appending, make_folder, read_lines, write_json
from pipeline.training.config import Settings

MAX_JSON_BYTES = 1 << 20  # of made.json and trees.json
TREE_ENTRIES = {"boosted": ("boosted trees", "trees"), "rmtgb": ("R-MTGB", "rmtgb")}  # of trees: name and folder

logger = logging.getLogger(__name__)


class CompareConfig(BaseModel):
    """Settings of jobs.compare; see jobs/conf/compare.yaml."""

    model_config = ConfigDict(extra="forbid")
    folder: Path
    recipe_name: str | None = None
    models: list[str] = Field(min_length=1)
    baseline: str
    seeds: int = Field(3, ge=1)
    trees: list[Literal["boosted", "rmtgb"]] = ["boosted", "rmtgb"]
    trees_max_rows: int = Field(1_000_000, ge=1)
    patience: int = Field(2, ge=0)
    workers: int = Field(2, ge=1)
    overrides: list[str] = []
    emm_sources: dict[str, list[str]] = {}
    model_overrides: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Jobs:
    """Runs jobs as processes of this Python.

    Attributes:
        data: arguments of jobs.preprocess that choose and change its data group.
        config_dirs: --config-dir= arguments for every job: files of the user's own.
    """

    data: Sequence[str]
    config_dirs: Sequence[str] = ()

    def run(self, module: str, *arguments: str, log: Path | None = None) -> None:
        """Runs one to its end, its output to `log` (None: stderr). Raises UserError where it fails."""
        command = [sys.executable, "-m", module, *self.config_dirs, *arguments]
        with appending(log) if log else nullcontext(sys.stderr) as output:
            code = subprocess.call(command, stdout=output, stderr=output)
        if code:
            where = f": see {log}" if log else ""
            raise UserError(f"{module} {' '.join(arguments)} ended with exit code {code}{where}")


def compare(config: CompareConfig, jobs: Jobs) -> tuple[list[Entry], dict[str, str]]:
    """Preprocesses once, trains and evaluates every model and seed, and fits the trees.

    Returns: the entries, trees last, and the tasks with their kinds.
    Raises:
        UserError: bad input, a job that fails, or a run in the folder that was made with other settings.
    """
    if config.baseline not in config.models:
        raise UserError(f"baseline={config.baseline} is not one of models: {', '.join(config.models)}")
    data = refuse_link(config.folder / "data")
    if not (data / "manifest.json").exists():
        jobs.run("jobs.preprocess", *jobs.data, setting("out", data))
    dataset = Dataset(data)
    entries = {name: Entry(name) for name in config.models}
    runs = Runs(config, jobs, dataset)
    pairs = [(name, seed) for name in config.models for seed in range(config.seeds)]
    with ThreadPoolExecutor(config.workers) as pool:
        futures = [pool.submit(runs.run, *pair) for pair in pairs]
        try:
            for done, ((name, seed), future) in enumerate(zip(pairs, futures, strict=True), 1):
                found, rows = future.result()
                entries[name].runs.append(found)
                entries[name].rows.append(rows)
                logger.info("%d/%d  %s seed %d  epoch %s", done, len(pairs), name, seed, found["epoch"])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that wait would be started otherwise
            raise
    for name, entry in entries.items():
        scorer = Scorer(Run(config.folder / f"{name}-0"), dataset, "test", 256)
        entry.cost = model_cost(scorer.ranker, next(scorer.batches()).to(scorer.weights.device))
    for kind in config.trees:
        entries[TREE_ENTRIES[kind][0]] = _trees(kind, config, dataset)
    return list(entries.values()), {name: task.kind for name, task in dataset.schema.tasks.items()}


class Runs:
    """The runs below a comparison's folder, each trained and evaluated by processes on one core."""

    def __init__(self, config: CompareConfig, jobs: Jobs, dataset: Dataset) -> None:
        self.config, self.jobs, self.dataset = config, jobs, dataset
        self.kinds = {name: task.kind for name, task in dataset.schema.tasks.items()}
        self.source_locks: defaultdict[int, Lock] = defaultdict(Lock)  # by seed

    def run(self, name: str, seed: int) -> tuple[dict[str, Any], Path]:
        """Trains one model (or resumes it), and evaluates the checkpoints that count on the test split.

        Returns: the record of an `Entry`'s run and the test predictions, both of the checkpoint that early stopping keeps.
        """
        path = self.config.folder / f"{name}-{seed}"
        own = list(self.config.model_overrides.get(name, []))
        if not any(text.startswith("model=") for text in own):
            own.insert(0, f"model={name}")
        if "model=emm" in own:
            own.append(f"model.from={self._emm_sources(seed)}")
        self._train(path, seed, [*own, f"train.checkpoint_at={list(SHARES)}"])
        run = Run(path)
        name_of_rows, train = dataset_of(run, EvaluateConfig(run=path)).name, settings_of(run)
        valid = self._evaluate(run, name_of_rows)
        if not valid or not valid[-1]["step"]:
            raise UserError(f"{path}: no checkpoint of it has been evaluated. Remove it: it is trained again.")
        steps, total = [r["step"] for r in valid], valid[-1]["step"]
        every = train.checkpoint_every or max(1, total // train.epochs)
        regular = [r for r in valid if r["step"] % every == 0 or r["step"] == total]
        step = stop_early(regular, self.kinds, self.config.patience)
        early = [min(steps, key=lambda s: abs(s - share * total)) for share in (*SHARES, 1)]
        metrics = self._test(run, name_of_rows, sorted({step, *early}))
        rates = [rate for r in read_lines(run.train_metrics) if isinstance(rate := r.get("rows_per_s"), float)][1:]
        record = {
            "step": step,
            "epoch": round(step * train.epochs / total, 1),
            "rows_per_s": statistics.median(rates or [float("nan")]),
            "metrics": metrics[step],
            "early": {f"{round(s / total * 7)}/7": metrics[s] for s in early},
        }
        return record, predictions.path(run, "test", step)

    def _train(self, path: Path, seed: int, own: list[str]) -> None:
        """Trains a run, or resumes it. Raises UserError for one that was made with other settings."""
        config = self.config
        make_folder(path)
        recipe = [f"recipe={config.recipe_name}"] if config.recipe_name else []
        settings, earlier = [*recipe, *config.overrides, *own], path / "made.json"
        if lstat_regular(path, earlier.name) and read_json(path, earlier.name, MAX_JSON_BYTES) != settings:
            raise UserError(f"{path} was made with another recipe or overrides. Choose another folder=, or remove it.")
        write_json(earlier, settings)
        if (status := Run(path).status()) and status.state == "finished":
            return
        fixed = [setting("dataset", self.dataset.path), setting("run", path), f"train.seed={seed}", "train.threads=1"]
        self.jobs.run("jobs.train", *fixed, *settings, log=path / "log.txt")

    def _emm_sources(self, seed: int) -> list[str]:
        """Trains the runs that emm is fused from: one of each kind for each task."""
        paths = []
        with self.source_locks[seed]:  # two models may be fused from the same
            for task in self.dataset.schema.tasks:
                for kind, own in self.config.emm_sources.items():
                    paths.append(self.config.folder / f"{kind}-{task}-{seed}")
                    self._train(paths[-1], seed, [*own, f"tasks=[{task}]"])
        return [str(path) for path in paths]

    def _evaluate(self, run: Run, rows: str) -> list[dict[str, Any]]:
        """The records of all checkpoints on the validation split, in order of step."""
        if set(checkpoint.steps(run.checkpoints)) - records.current(run, "valid", rows).keys():
            self.jobs.run(
                "jobs.evaluate", setting("run", run.path), "split=valid", "threads=1", log=run.path / "log.txt"
            )
        found = list(records.latest(run, "valid", rows).values())
        check_complete(found, self.kinds, run)
        return found

    def _test(self, run: Run, rows: str, steps: list[int]) -> dict[int, Any]:
        """Metrics on the test split by step; predictions of these steps are written."""
        stale = {*checkpoint.steps(run.checkpoints)} & {*steps} - records.current(run, "test", rows).keys()
        if stale or not all(predictions.path(run, "test", step).exists() for step in steps):
            arguments = (setting("run", run.path), "split=test", f"step={steps}", "predictions=true", "threads=1")
            self.jobs.run("jobs.evaluate", *arguments, log=run.path / "log.txt")
        found = records.latest(run, "test", rows)
        check_complete(found.values(), self.kinds, run)
        return {step: record["metrics"] for step, record in found.items()}


def settings_of(run: Run) -> Settings:
    """The training settings of a run. Raises UserError where its config.yaml has others than jobs.train writes."""
    try:
        return Settings.model_validate(run.config()["train"])
    except ValidationError as error:
        raise UserError(f"{run.path / 'config.yaml'}: train.{first_fault(error)}. Restore it.") from None


def stop_early(evaluated: Sequence[Mapping[str, Any]], kinds: Mapping[str, str], patience: int) -> int:
    """Step of the checkpoint that early stopping on the mean ranking metric (AUC; regression: R2) keeps.

    Args:
        evaluated: records in order of step. patience: records without a better mean before stopping.
    """
    best, best_value = 0, -float("inf")
    for index, record in enumerate(evaluated):
        value = statistics.mean(record["metrics"][task][RANKING[kind]] or 0.0 for task, kind in kinds.items())
        if value > best_value:
            best, best_value = index, value
        elif index - best >= patience:
            break
    return evaluated[best]["step"]


def _trees(kind: str, config: CompareConfig, dataset: Dataset) -> Entry:
    """The entry of a kind of trees, fitted once and kept."""
    name, place = TREE_ENTRIES[kind]
    folder = config.folder / place
    kept, rows = folder / "trees.json", folder / "test.parquet"
    if not lstat_regular(config.folder, f"{place}/trees.json"):
        logger.info(name)
        limit = {"max_rows": config.trees_max_rows}
        write_json(kept, TREES[kind](dataset, config.trees_max_rows, 0, rows) | limit)
    found = validated(TreesRecord, read_json(folder, kept.name, MAX_JSON_BYTES), kept)
    if found.max_rows not in (config.trees_max_rows, None):
        raise UserError(
            f"{folder} was made with trees_max_rows={found.max_rows}. Choose another folder=, or remove it."
        )
    if not is_complete(found.metrics, {name: task.kind for name, task in dataset.schema.tasks.items()}):
        raise UserError(f"{kept}: lacks a metric of a task. Remove it: jobs.compare writes it anew.")
    if found.outlier_weight:
        weights = "  ".join(f"{task} {weight:.2f}" for task, weight in found.outlier_weight.items())
        logger.info("%s  weight of the outliers' trees: %s", name, weights)
    return Entry(name, [found.model_dump()], [rows])


class TreesRecord(BaseModel):
    """What trees.json holds: metrics by task, rows/s, trees by task, and of R-MTGB the weight of the outliers' trees.

    And trees_max_rows, which files of earlier versions lack.
    """

    metrics: dict[str, dict[str, int | float | None]]
    rows_per_s: float
    trees: dict[str, int]
    outlier_weight: dict[str, float] = {}
    max_rows: int | None = None
