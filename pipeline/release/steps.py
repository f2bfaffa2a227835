"""The steps of a night before its verdict: choose the models, encode the day, check its data, train, score."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.days import day_of
from pipeline.evaluation.follow import EvaluateConfig, dataset_of
from pipeline.evaluation.metrics import evaluated as figures
from pipeline.evaluation.metrics.evaluated import ALL
from pipeline.evaluation.metrics.slice_names import Dimensions
from pipeline.evaluation.metrics.slices import dimensions
from pipeline.release import encoded_day, scoring, training_step
from pipeline.release.config import NightlyConfig
from pipeline.release.data_checks import check_data
from pipeline.release.encoded_day import Origin, identity, origin_of, origin_of_days
from pipeline.release.gates import check_same_labels, check_same_tasks
from pipeline.release.night import ModelReference, Night, Scored, Strict, Text
from pipeline.release.scoring_ranks import Work, score_on_ranks
from pipeline.release.serving import Blessed
from pipeline.run import records
from pipeline.run.headline import headline
from pipeline.run.run import Run
from pipeline.storage.store_path import place

logger = logging.getLogger(__name__)

ALL_ROLES = ("candidate", "serving", "best")


class Chosen(Strict):
    """The summary of `models`: what is scored, and with `train` the run that the candidate starts from and the days it sees."""

    candidate: ModelReference | None = None
    serving: ModelReference | None = None
    best: ModelReference | None = None
    start: Text | None = None
    days: Text | None = None

    def role(self, name: str) -> ModelReference | None:
        """The model of a role; None: it has none, or it is trained yet."""
        found: ModelReference | None = getattr(self, name)
        return found


class Encoded(Strict):
    """The summary of `preprocess`: folders of the encoded day by role, and identities of their manifests by folder."""

    folders: dict[Text, Text]
    manifests: dict[Text, Text] = Field(max_length=10)

    def there(self) -> bool:
        """Whether the datasets are still what they were."""
        return all(identity(place(folder)) == known for folder, known in self.manifests.items())


def measured(config: NightlyConfig) -> tuple[dict[str, str], Dimensions]:
    """Task → kind of the candidate, in order (with `train`: of `days`), and the dimensions of the slices with their names.

    Raises:
        UserError: no such run or dataset, or a slice that it cannot have.
    """
    origin = origin_of(config, Run(config.run)) if config.run else origin_of_days(config)
    schema = _schema(config)
    found = dimensions(config, origin.dataset.only([*schema.tasks]))
    kinds: dict[str, str] = {name: task.kind for name, task in schema.tasks.items()}
    return kinds, {dimension.name: dimension.slice_names for dimension in found}


def _schema(config: NightlyConfig) -> Schema:
    """The candidate's; with `train` that of `days`."""
    return Run(config.run).schema() if config.run else origin_of_days(config).dataset.schema


def choose(config: NightlyConfig, kinds: Mapping[str, str], served: Blessed | None, nights: Sequence[Night]) -> Chosen:
    """What is scored: all that can be refused is refused before any work.

    Args:
        served: of OUT/serving.json, before this night. nights: of OUT.
    Raises:
        UserError: a model that is not there, or of other tasks or labels.
    """
    serving = None
    if config.serving:
        serving = scoring.reference(Run(config.serving), config.serving_step)
    elif served:
        serving = served.model
    ours = str(config.run or config.days)
    if serving:
        theirs = Run(place(serving.run)).schema().tasks
        check_same_tasks(kinds, {name: task.kind for name, task in theirs.items()}, ours, serving.run)
        check_same_labels(_schema(config).tasks, theirs, ours, serving.run)
        if day_of(config.date) in training_step.trained_on(Run(place(serving.run))):
            logger.warning("%s was trained on %s: its figures of that day are too good", serving.run, config.date)
    if config.train is not None:
        start = training_step.warm_start(config, nights, serving)
        training_step.check_first(config, start, origin_of_days(config).dataset.schema)
        days = training_step.new_days(config, start, nights)
        return Chosen(serving=serving, start=str(start) if start else None, days=days)
    assert config.run is not None
    run = Run(config.run)
    candidate = scoring.reference(run, config.step)
    if day_of(config.date) in training_step.trained_on(run):
        raise UserError(
            f"{run.path} was trained on {config.date} (or the run whose weights it started from was), so its figures of that "
            "day would be too good. Judge it on another day: date=."
        )
    return Chosen(candidate=candidate, serving=serving, best=_best(run, config, candidate))


def _best(run: Run, config: NightlyConfig, candidate: ModelReference) -> ModelReference | None:
    """The checkpoint with the least mean headline metric on the split `best`; None: it is the candidate, or not asked for."""
    if config.best is None:
        return None
    name = dataset_of(run, EvaluateConfig(run=run.path)).name
    found = records.current(run, config.best, name)
    means = {
        step: sum(values) / len(values)
        for step, record in found.items()
        if (values := [m[headline(m)] for m in record["metrics"].values()]) and None not in values
    }
    if not means:
        raise UserError(
            f"best={config.best}: no checkpoint of {run.path} is evaluated on it. Run jobs.evaluate run={run.path} "
            f"split={config.best} first, or leave best out."
        )
    best = scoring.reference(run, min(means, key=lambda step: (means[step], step)))
    return None if best == candidate else best


def still_there(chosen: Chosen) -> bool:
    """Whether every checkpoint is what it was when it was chosen."""
    models = [model for name in ALL_ROLES if (model := chosen.role(name))]
    return all(records.checksum(Run(place(model.run)), model.step) == model.checkpoint for model in models)


def origins(config: NightlyConfig, chosen: Chosen) -> dict[str, Origin]:
    """By role what the day is encoded with. Raises UserError."""
    found = {name: origin_of(config, Run(place(model.run))) for name in ALL_ROLES if (model := chosen.role(name))}
    return found if config.train is None else {"candidate": origin_of_days(config), **found}


def preprocess(config: NightlyConfig, of_roles: Mapping[str, Origin]) -> Encoded:
    """Encodes the day once for each set of encoders and state. Raises UserError."""
    by_key: dict[str, Path] = {}
    for origin in of_roles.values():
        if origin.key not in by_key:
            by_key[origin.key] = encoded_day.encode(config, origin)
    folders = {role: str(by_key[origin.key].absolute()) for role, origin in of_roles.items()}
    return Encoded(folders=folders, manifests={folder: identity(place(folder)) for folder in folders.values()})


def check(config: NightlyConfig, encoded: Encoded, origin: Origin, rows_before: Sequence[int]) -> dict[str, Any]:
    """The summary of `check`, of the day as it is encoded for the candidate."""
    day = Dataset(place(encoded.folders["candidate"]))
    return check_data(config.data_gates, day, origin.dataset, rows_before).model_dump()


def train(config: NightlyConfig, chosen: Chosen, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The summary of `train`: the run, its newest checkpoint, and what it was trained on. Raises UserError, Preempted."""
    assert config.train is not None
    assert chosen.days is not None
    start = place(chosen.start) if chosen.start else None
    path = training_step.train(config, config.train, chosen.days, start)
    run = Run(path)
    trained = {name: task.kind for name, task in run.schema().tasks.items()}
    check_same_tasks(trained, kinds, str(path), str(config.days))
    model = scoring.reference(run, None)
    return {"run": str(path), "model": model.model_dump(), "days": chosen.days, "start": chosen.start}


def evaluate(config: NightlyConfig, role: str, model: ModelReference, encoded: Encoded) -> dict[str, Any]:
    """Scores the model of a role and writes its figures to ROLE.parquet of the night. Raises UserError, Preempted."""
    folder = encoded.folders[role]
    if config.ranks == 1:
        found, record = scoring.score(model, Dataset(place(folder)), config.batch_size, config.measure, config.loading)
    else:
        work = Work(
            model=model, day=folder, batch_size=config.batch_size, measure=config.measure, tables=config.tables,
            precision=config.table_precision,
        )  # fmt: skip
        found, record = score_on_ranks(work, config.ranks, config.folder)
    file = f"{role}.parquet"
    figures.write(found, config.folder / file)
    return Scored(model=model, day=folder, file=file, figures=scoring.figures_of(found), record=record).model_dump()


def compare(ours: figures.Evaluated, theirs: figures.Evaluated) -> dict[str, Any]:
    """The summary of `compare`: each task's change of its headline metric, with its standard error paired by bucket."""
    lines = figures.paired(ours, theirs)
    wanted = scoring.figures_of(ours)
    found = lines.filter(slice=ALL).select("task", "metric", "ours", "theirs", "delta", "se", "buckets", "rows")
    return {"changes": [line for line in found.iter_rows(named=True) if wanted[line["task"]].metric == line["metric"]]}
