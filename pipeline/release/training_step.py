"""The candidate of a night that trains: a run on the days that no earlier night's has seen, from that one's weights."""

import logging
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from features.errors import Preempted, UserError
from features.schema.schema import Schema
from pipeline.dataset.days import chosen_days, day_of, days_in, folder_of_day, parse_days, ranges_of
from pipeline.overrides import setting
from pipeline.release.child import run_module
from pipeline.release.config import NightlyConfig, TrainStep
from pipeline.release.data_checks import checked_of
from pipeline.release.encoded_day import earlier_days, identity
from pipeline.release.night import ModelReference, Night
from pipeline.run.run import Run, config_hash
from pipeline.storage.files import storage_of
from pipeline.storage.store_path import place

LOG = "train.log"

logger = logging.getLogger(__name__)


def warm_start(config: NightlyConfig, nights: Sequence[Night], serving: ModelReference | None) -> Path | None:
    """The run that a night's training starts from: that of the last earlier night that trained and passed.

    Without one it is `train.init_from`, then the serving one; None: the training starts from nothing.
    """
    assert config.train is not None
    ours = day_of(config.date)
    for night in reversed(nights):
        theirs = day_of(night.date)
        if night.outcome == "pass" and night.summary("train") and ours and theirs and theirs < ours:
            run = place(str((night.summary("train") or {}).get("run")))
            if (run / "config.yaml").is_file():
                return run
    if config.train.init_from:
        return config.train.init_from.absolute()
    return place(serving.run) if serving else None


def new_days(config: NightlyConfig, start: Path | None, nights: Sequence[Night]) -> str:
    """The days to train on: those before the judged one that the run `start` has not seen; without one all of them.

    A model is not judged on a day that it was trained on. Days whose data a night has refused are left out.

    Raises:
        UserError: there is no such day.
    """
    earlier = earlier_days(config)
    seen = None
    if start is not None:
        content = Run(start).config()
        if days := content.get("days"):
            missing = content.get("missing_days", "refuse")
            seen = day_of(chosen_days(place(content["dataset"]), days, missing)[-1])
        else:
            seen = day_of(place(content["dataset"]).name)
    found = [day for day in earlier if seen is None or day > seen]
    faulty = {day_of(night.date) for night in nights if (checked := checked_of(night)) and checked.refused}
    if refused := ", ".join(ranges_of(day for day in found if day in faulty)):
        logger.warning(
            "train: without %s, whose data was refused: data_gates.action=warn again=true accepts it", refused
        )
        found = [day for day in found if day not in faulty]
    if not found:
        after = f" after {seen}, the last one that {start} was trained on, and" if seen else ""
        but = f" but {refused}, whose data was refused" if refused else ""
        raise UserError(
            f"days={config.days}: no day{after} before {config.date}{but}. Run "
            "jobs.preprocess with date= for the days between, or judge that run: run= instead of train=."
        )
    return ",".join(ranges_of(found))


def trained_on(run: Run) -> set[date]:
    """The days that a run, and the runs whose weights it started from, were trained on; none where datasets are of no days.

    Of a run that left missing days out these are the named ones that are there now; all of them where none is.
    """
    found: set[date] = set()
    known: set[Path] = set()
    path: Path | None = run.path
    while path and path not in known and (path / "config.yaml").is_file():
        known.add(path)
        run = Run(path)
        content = run.config()
        if not (days := content.get("days")):
            found |= {day for day in [day_of(place(content["dataset"]).name)] if day}
        else:
            named = {*parse_days(days)}
            there = named & {*days_in(place(content["dataset"]))} if content.get("missing_days") == "skip" else None
            found |= there or named
        start = (content.get("train") or {}).get("init_from")
        try:
            path = place(start) if start else None
        except ValueError as error:
            raise UserError(f"{run.path / 'config.yaml'}: train.init_from: {error}. Restore it.") from None
    return found


def check_first(config: NightlyConfig, start: Path | None, schema: Schema) -> None:
    """Raises UserError where the training could not start from the run. Args: schema: of the days."""
    if start is None:
        return
    tasks = Run(start).schema().tasks
    if missing := [name for name in tasks if name not in schema.tasks]:
        raise UserError(f"{start} predicts {', '.join(missing)}, which {config.days} has no labels of")


def data_of(config: NightlyConfig, days: str) -> list[list[str]]:
    """The days that are trained on, each with what identifies its dataset. Raises UserError where one has none."""
    assert config.days is not None
    found = chosen_days(config.days, days, "refuse")
    return [[day, identity(folder_of_day(config.days, day))] for day in found]


def train(config: NightlyConfig, step: TrainStep, days: str, start: Path | None) -> Path:
    """Trains OUT/DATE/run-KEY to its end in a process of its own, and resumes it where it was killed.

    KEY identifies what it is trained with: a run of other settings, data or weights is never gone on with.

    Raises:
        UserError: it failed; its output is in train.log.
        Preempted: it was asked to end, and has saved its work.
    """
    assert config.days is not None
    trained_with = [str(config.days.absolute()), data_of(config, days), str(start), *step.args]
    run = (config.folder / f"run-{config_hash(trained_with)}").absolute()
    start_from = [setting("train.init_from", start)] if start else []
    own = [setting("dataset", config.days.absolute()), f"days=[{days}]", setting("run", run), *start_from]
    wait_for_trainer(Run(run))
    log = config.folder / LOG
    code = run_module("jobs.train", [*own, *step.args], step.ranks, log)
    if code == os.EX_TEMPFAIL:
        raise Preempted(f"{run}: preempted, its checkpoint is kept. Run the same command again.")
    if code:
        raise UserError(f"the training of {run} ended with exit code {code}: see {log}")
    return run


def wait_for_trainer(run: Run) -> None:
    """Waits until the trainer of a night that was killed has saved its work and ended."""
    file = run.eval_metrics.with_name(".train.lock")
    if file.exists():
        storage_of(file).lock(file, wait=True).release()
