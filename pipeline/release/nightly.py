"""The nightly verdict: whether the newest checkpoint is as good on a new day's log as the serving one."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError
from features.regular_files import RelativePath, refuse_link
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import MissingDays, chosen_days, day_of
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.past_state import state_id, state_lines
from pipeline.evaluation.scorer import Scorer
from pipeline.ingest.config import EncodersFrom, PreprocessConfig, StateFrom
from pipeline.ingest.job import preprocess
from pipeline.ingest.past_start import newest_dataset
from pipeline.run import checkpoint
from pipeline.run.headline import headline
from pipeline.run.run import Run
from pipeline.storage.files import make_folder, write_json

logger = logging.getLogger(__name__)


class NightlyConfig(BaseModel):
    """Settings of jobs.nightly; see jobs/conf/nightly.yaml."""

    model_config = ConfigDict(extra="forbid")
    run: Path
    serving: Path | None = None
    serving_step: int | None = None
    input: str
    out: Path
    date: Annotated[RelativePath, Field(pattern=r"^[^/]+$")]
    max_increase: float = Field(0.002, ge=0)
    batch_size: int = Field(8192, ge=1)
    max_bad_fraction: float = 0.001
    missing_days: MissingDays = "refuse"

    @property
    def folder(self) -> Path:
        """Where this night's results go."""
        return self.out / self.date


@dataclass(frozen=True)
class ModelScore:
    """A checkpoint's metrics over all rows of the day, encoded with the encoders of its run; dataset: the encoded day."""

    run: str
    step: int
    dataset: str
    metrics: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TaskVerdict:
    """One task: both values of its headline metric `figure` (lower is better; None: undefined), and the outcome."""

    figure: str
    candidate: float | None
    serving: float | None
    passed: bool
    why: str


@dataclass(frozen=True)
class Verdict:
    """The content of verdict.json. passed: every task passed. serving: None where there was nothing to compare with."""

    passed: bool
    input: str
    max_increase: float
    tasks: dict[str, TaskVerdict]
    candidate: ModelScore
    serving: ModelScore | None


def nightly(config: NightlyConfig) -> Verdict:
    """Encodes the day with each model's encoders, evaluates both, and writes verdict.json.

    Raises:
        UserError: bad input; there is then no verdict.json.
    """
    make_folder(config.folder)
    (config.folder / "verdict.json").unlink(missing_ok=True)
    days: dict[str, Dataset] = {}
    candidate = _evaluate(config, days, Run(config.run), None)
    serving = _evaluate(config, days, Run(config.serving), config.serving_step) if config.serving else None
    figures = {task: headline(metrics) for task, metrics in candidate.metrics.items()}
    # In the same order too, as records list the tasks of the schema.
    if serving and [*figures.items()] != [(task, headline(metrics)) for task, metrics in serving.metrics.items()]:
        raise UserError(
            f"{config.run} predicts {', '.join(candidate.metrics)}, {config.serving} predicts "
            f"{', '.join(serving.metrics)}: only models of the same tasks can be compared"
        )
    tasks = {
        task: _judge(candidate.metrics[task], serving.metrics[task][figure] if serving else None, figure, config)
        for task, figure in figures.items()
    }
    passed = all(task.passed for task in tasks.values())
    verdict = Verdict(passed, config.input, config.max_increase, tasks, candidate, serving)
    write_json(config.folder / "verdict.json", asdict(verdict))
    return verdict


def _judge(ours: dict[str, Any], theirs: float | None, figure: str, config: NightlyConfig) -> TaskVerdict:
    """Whether a task passes, and why. An undefined metric passes only where the day has too few labels for it."""
    if ours.get("non_finite"):
        passed, why = False, f"{ours['non_finite']} predictions are not finite"
    elif ours[figure] is None:
        passed, why = True, f"the day has too few labels for {figure}"
    elif theirs is None:
        passed, why = True, "serving has no such figure to compare with"
    else:
        increase = ours[figure] - theirs
        passed, why = increase <= config.max_increase, f"{increase:+.4f}, allowed {config.max_increase:+.4f}"
    return TaskVerdict(figure, ours[figure], theirs, passed, why)


def _evaluate(config: NightlyConfig, days: dict[str, Dataset], run: Run, step: int | None) -> ModelScore:
    """Scores one checkpoint (None: the newest) on all splits of the day.

    Args:
        days: encoded so far, by the ids of encoders and state: models of the same ones share one.
    """
    found = checkpoint.steps(run.checkpoints)
    if not found or (step is not None and step not in found):
        raise UserError(
            f"{run.checkpoints}: no checkpoint{f' of step {step}' if step else ''}, there are {found or 'none'}"
        )
    step = found[-1] if step is None else step
    content = run.config()
    trained_on, trained_days = Path(content["dataset"]), content.get("days")
    if trained_days:  # all have the same encoders
        trained_days = chosen_days(trained_on, trained_days, content.get("missing_days", "refuse"))[0]
    dataset = open_dataset(trained_on, trained_days)
    state, key = None, dataset.encoders_id
    if dataset.schema.past:
        state = newest_dataset(trained_on, day_of(config.date), config.missing_days)
        known = read_manifest(state).state
        key += f"-{state_id(known)}" if known else ""
    if key not in days:
        days[key] = _encode(config, dataset, state, config.folder / f"day-{key}")
    day = days[key]
    if not any(day.manifest.rows.values()):
        raise UserError(f"{config.input}: no rows. Check input= and the day's logs.")
    metrics = Scorer(run, day, "all", config.batch_size).metrics(step)[0]
    return ModelScore(str(run.path), step, str(day.path), metrics.compute())


def _encode(config: NightlyConfig, trained_on: Dataset, state: Path | None, out: Path) -> Dataset:
    """Encodes the day with the encoders of `trained_on`; histories and counters go on from the dataset `state`."""
    settings = PreprocessConfig(
        input=config.input,
        out=refuse_link(out),
        encoders=EncodersFrom.model_validate({"from": trained_on.encoded_by}),
        state=StateFrom.model_validate({"from": state and str(state)}),
        max_bad_fraction=config.max_bad_fraction,
        overwrite=True,
    )
    manifest = preprocess(settings, trained_on.schema)
    for line in state_lines(manifest.state) if manifest.state else ():
        logger.info(line)
    return Dataset(out)
