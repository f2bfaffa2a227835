"""Trains and evaluates the runs of a comparison: each model on each seed, and trees. Complete runs are not repeated."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

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
from pipeline.search.compare_config import RANDOM, SEARCHED, CompareConfig, is_searched
from pipeline.search.comparison import SHARES, Entry
from pipeline.search.trained import Jobs, Trainings
from pipeline.storage.files import read_lines, write_json
from pipeline.training.config import Settings

MAX_JSON_BYTES = 1 << 20  # of trees.json
TREE_ENTRIES = {"boosted": ("boosted trees", "trees"), "rmtgb": ("R-MTGB", "rmtgb")}  # of trees: name and folder

logger = logging.getLogger(__name__)


def compare(config: CompareConfig, jobs: Jobs) -> tuple[list[Entry], dict[str, str]]:
    """Preprocesses once, trains and evaluates every model and seed, and fits the trees.

    Returns: the entries, trees last, and the tasks with their kinds.
    Raises:
        UserError: bad input, a job that fails, or a run in the folder that was made with other settings.
    """
    _check_names(config)
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
    for entry in entries.values():
        # Seeds of a search have unlike networks; of all else the same.
        unlike = entry.name == RANDOM or is_searched(config.own(entry.name))
        costs = [_cost(config.folder / run["run"], dataset) for run in entry.runs[: None if unlike else 1]]
        entry.cost = {key: statistics.mean(cost[key] for cost in costs) for key in costs[0]}
    for kind in config.trees:
        entries[TREE_ENTRIES[kind][0]] = _trees(kind, config, dataset)
    return list(entries.values()), {name: task.kind for name, task in dataset.schema.tasks.items()}


def _cost(path: Path, dataset: Dataset) -> dict[str, Any]:
    scorer = Scorer(Run(path), dataset, "test", 256)
    return model_cost(scorer.ranker, next(scorer.batches()).to(scorer.weights.device))


def _check_names(config: CompareConfig) -> None:
    """Raises UserError for names of models that do not go together."""
    models = ", ".join(config.models)
    if config.baseline not in (None, *config.models):
        raise UserError(f"baseline={config.baseline} is not one of models: {models}")
    if RANDOM not in config.models:
        return
    if SEARCHED not in config.models:
        raise UserError(f"models: {RANDOM} takes as long as {SEARCHED} did, which is not among {models}. Add it.")
    for name in (SEARCHED, RANDOM):
        if not is_searched(config.own(name)):
            raise UserError(f"model_overrides.{name}: {RANDOM} draws what model={SEARCHED} searches: leave it to both.")


class Choice(NamedTuple):
    """A run and the checkpoint that early stopping keeps of it.

    Attributes:
        value: its mean ranking metric on the validation split. valid: the records of all the run's checkpoints there.
        rows: name of the dataset that they were evaluated on. train: how the run was trained.
    """

    run: Run
    step: int
    value: float
    valid: Sequence[Mapping[str, Any]]
    rows: str
    train: Settings


class Runs:
    """The runs below a comparison's folder, each trained and evaluated by processes on one core."""

    def __init__(self, config: CompareConfig, jobs: Jobs, dataset: Dataset) -> None:
        self.config, self.jobs, self.dataset = config, jobs, dataset
        self.kinds = {name: task.kind for name, task in dataset.schema.tasks.items()}
        self.trainings = Trainings(config, jobs, dataset)

    def run(self, name: str, seed: int) -> tuple[dict[str, Any], Path]:
        """Trains one model (or resumes it), and evaluates the checkpoints that count on the test split.

        Returns: the record of an `Entry`'s run and the test predictions, both of the checkpoint that early stopping keeps.
        """
        trained = self.trainings.of(name, seed)
        choices = [self._choose(Run(path)) for path in trained.candidates]
        chosen = max(choices, key=lambda choice: choice.value)  # of equal ones the first
        run, step, total = chosen.run, chosen.step, chosen.valid[-1]["step"]
        steps = [r["step"] for r in chosen.valid]
        early = [min(steps, key=lambda s: abs(s - share * total)) for share in (*SHARES, 1)]
        metrics = self._test(run, chosen.rows, sorted({step, *early}))
        rates = [rate for r in read_lines(run.train_metrics) if isinstance(rate := r.get("rows_per_s"), float)][1:]
        record = {
            "run": run.path.name,
            "step": step,
            "epoch": round(step * chosen.train.epochs / total, 1),
            "rows_per_s": statistics.median(rates or [float("nan")]),
            "hours": trained.hours(),
            "search_hours": trained.search_hours(),
            "metrics": metrics[step],
            "early": {f"{round(s / total * 7)}/7": metrics[s] for s in early},
        }
        return record, predictions.path(run, "test", step)

    def _choose(self, run: Run) -> Choice:
        """Evaluates a run's checkpoints on the validation split, and chooses one."""
        rows, train = dataset_of(run, EvaluateConfig(run=run.path)).name, settings_of(run)
        valid = self._evaluate(run, rows)
        if not valid or not valid[-1]["step"]:
            raise UserError(f"{run.path}: no checkpoint of it has been evaluated. Remove it: it is trained again.")
        total = valid[-1]["step"]
        every = train.checkpoint_every or max(1, total // train.epochs)
        regular = [r for r in valid if r["step"] % every == 0 or r["step"] == total]
        step = stop_early(regular, self.kinds, self.config.patience)
        value = next(mean_ranking(r, self.kinds) for r in regular if r["step"] == step)
        return Choice(run, step, value, valid, rows, train)

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
    """Step of the checkpoint that early stopping on `mean_ranking` keeps.

    Args:
        evaluated: records in order of step. patience: records without a better mean before stopping.
    """
    best, best_value = 0, -float("inf")
    for index, record in enumerate(evaluated):
        value = mean_ranking(record, kinds)
        if value > best_value:
            best, best_value = index, value
        elif index - best >= patience:
            break
    return evaluated[best]["step"]


def mean_ranking(record: Mapping[str, Any], kinds: Mapping[str, str]) -> float:
    """The mean over tasks of the ranking metric (AUC; regression: R2); an undefined one counts as 0."""
    return statistics.mean(record["metrics"][task][RANKING[kind]] or 0.0 for task, kind in kinds.items())


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
