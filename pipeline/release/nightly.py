"""The nightly verdict: is the newest checkpoint at least as good on a new day as the one that serves?"""

from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.scorer import Evaluator
from pipeline.ingest.config import EncodersFrom, PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import write_json


class NightlyConfig(BaseModel):
    """Settings of jobs.nightly; see jobs/conf/nightly.yaml."""

    model_config = ConfigDict(extra="forbid")
    run: Path
    serving: Path | None = None
    serving_step: int | None = None
    input: str
    out: Path
    date: str = Field(min_length=1, pattern=r"^[^/]+$")
    max_increase: float = Field(0.002, ge=0)
    batch_size: int = Field(8192, ge=1)
    max_bad_fraction: float = 0.001

    @property
    def folder(self) -> Path:
        """Where this night's results go."""
        return self.out / self.date


def nightly(config: NightlyConfig) -> dict[str, Any]:
    """Encodes the day as each model knows it, evaluates both, and writes verdict.json.

    Returns: the verdict: `passed`, both models' metrics, and per task the figure compared, lower is better.
    Raises:
        UserError: bad input; there is then no verdict.json.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "verdict.json").unlink(missing_ok=True)
    days: dict[str, Dataset] = {}
    candidate = _evaluate(config, days, Run(config.run), None)
    serving = _evaluate(config, days, Run(config.serving), config.serving_step) if config.serving else None
    if serving and [(t, "ne" in m) for t, m in serving["metrics"].items()] != [
        (t, "ne" in m) for t, m in candidate["metrics"].items()
    ]:
        raise UserError(
            f"{config.run} predicts {', '.join(candidate['metrics'])}, {config.serving} predicts "
            f"{', '.join(serving['metrics'])}: only models of the same tasks can be compared"
        )
    tasks = {}
    for task, ours in candidate["metrics"].items():
        figure = "ne" if "ne" in ours else "nrmse"
        theirs = serving["metrics"][task][figure] if serving else None
        tasks[task] = {
            "figure": figure,
            "candidate": ours[figure],
            "serving": theirs,
            **_judge(ours, theirs, figure, config),
        }
    verdict = {
        "passed": all(entry["passed"] for entry in tasks.values()),
        "input": config.input,
        "max_increase": config.max_increase,
        "tasks": tasks,
        "candidate": candidate,
        "serving": serving,
    }
    write_json(config.folder / "verdict.json", verdict)
    return verdict


def _judge(ours: dict[str, Any], theirs: float | None, figure: str, config: NightlyConfig) -> dict[str, Any]:
    """Whether a task passes, and why. A figure that cannot be computed passes only where the day cannot show it."""
    if ours.get("non_finite"):
        return {"passed": False, "why": f"{ours['non_finite']} predictions are not finite"}
    if ours[figure] is None:
        return {"passed": True, "why": f"the day has too few labels for {figure}"}
    if theirs is None:
        return {"passed": True, "why": "serving has no such figure to compare with"}
    increase = ours[figure] - theirs
    return {"passed": increase <= config.max_increase, "why": f"{increase:+.4f}, allowed {config.max_increase:+.4f}"}


def _evaluate(config: NightlyConfig, days: dict[str, Dataset], run: Run, step: int | None) -> dict[str, Any]:
    """Metrics of one checkpoint over all rows of the day, encoded with the encoders the run was trained with.

    `days` keeps what was encoded: models of the same encoders share it.
    """
    found = checkpoint.steps(run.checkpoints)
    if not found or (step is not None and step not in found):
        raise UserError(
            f"{run.checkpoints}: no checkpoint{f' of step {step}' if step else ''}, there are {found or 'none'}"
        )
    step = found[-1] if step is None else step
    trained_on = Path(run.config()["dataset"])
    days_read = run.config().get("days")
    dataset = open_dataset(trained_on, days_read and days_read.partition("..")[0])  # all have the same encoders
    key = dataset.encoders_id
    if key not in days:
        days[key] = _encode(config, dataset.encoded_by, dataset.schema, config.folder / f"day-{key}")
    day = days[key]
    parts = [
        Evaluator(run, day, split, config.batch_size).metrics(step)[0]
        for split, rows in day.manifest.rows.items()
        if rows
    ]
    if not parts:
        raise UserError(f"{config.input}: no rows. Check input= and the day's logs.")
    metrics = reduce(Metrics.merge, parts)
    return {"run": str(run.path), "step": step, "dataset": str(day.path), "metrics": metrics.compute()}


def _encode(config: NightlyConfig, trained_on: Path, schema: Schema, out: Path) -> Dataset:
    settings = PreprocessConfig(
        input=config.input,
        out=out,
        encoders=EncodersFrom.model_validate({"from": trained_on}),
        max_bad_fraction=config.max_bad_fraction,
        overwrite=True,
    )
    preprocess(settings, schema)
    return Dataset(out)
