"""The nightly job: whether a checkpoint is as good on a new day's log as the serving one, as a pipeline of recorded steps."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from features.errors import Preempted, UserError, one_line
from features.plain_json import first_fault, validated
from features.regular_files import lstat_regular, user_error_for_links
from pipeline.evaluation.metrics import evaluated as figures
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.release import pages, serving, steps
from pipeline.release.config import NightlyConfig
from pipeline.release.data_checks import Checked, rows_of_nights
from pipeline.release.encoded_day import earlier_days, identity
from pipeline.release.gates import check_gates, judge
from pipeline.release.gates_config import Gates, default_gates, load_gates
from pipeline.release.night import FILE, ModelReference, Night, Recorder, nights, open_night, tidy
from pipeline.release.outcome import announce, error_message, message_of
from pipeline.release.scoring import comparable
from pipeline.release.scoring_ranks import check_ranks
from pipeline.release.training_step import data_of
from pipeline.release.trend import Trend, trend
from pipeline.release.verdict import Outcome, Verdict
from pipeline.release.webhook import webhook_url
from pipeline.storage.files import make_folder, storage_of

LOCK = ".nightly.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A night that was judged, all nights of its folder, and what is announced of it."""

    night: Night
    trend: Trend
    message: dict[str, Any]


def nightly(config: NightlyConfig) -> Result:
    """Judges a date, or takes it up where it was killed; a date that was judged keeps its verdict. Announces the outcome.

    Raises:
        UserError: bad input or settings. What was done so far is kept in night.json.
        Preempted: a process that trains or scores was asked to end; a training has saved its work.
    """
    url = None
    try:
        url = webhook_url() if config.webhook else None
        check_ranks(config.ranks)
        with alone(config.out):
            gates, kinds = _gates(config)
            settings = config.identity | {"gates": gates.model_dump(mode="json")}
            recorder = open_night(config.folder, config.date, settings, config.again)
            if recorder.night.outcome is None:
                recorder.judged(*_judge(config, recorder, gates, kinds))
            if config.bless == "pass" and recorder.night.outcome == "pass":
                _bless(config, recorder)
            found = trend(config.out, config.decay_nights, config.decay_confidence)
            _trend_page(config, found, kinds)
    except Preempted:
        raise
    except Exception as error:
        announce(config, error_message(config, error), url)
        raise
    alarms = next(point.alarms for point in found.nights if point.date == config.date)
    message = message_of(config, recorder.night, alarms)
    announce(config, message, url)
    return Result(recorder.night, found, message)


def go_back(config: NightlyConfig) -> dict[str, Any]:
    """Moves the pointer one back, with `withdraw` once. Returns the JSON line. Raises UserError, see `serving.back`."""
    if not config.out.is_dir():
        raise UserError(f"{config.out} is missing: there is nothing to go back to. Check out=.")
    with alone(config.out):
        last, now, moved = serving.back(config.out, config.withdraw)
    serves, withdrawn = f"{now.model} of night {now.night} serves", f"{last.model} of night {last.night} is withdrawn"
    return {
        "outcome": "back",
        "exit_code": 0,
        "why": f"{serves} again, {withdrawn}" if moved else f"{withdrawn} already, {serves}",
        "serving": now.model.model_dump(),
        "withdrawn": last.model.model_dump(),
        "repeat": f"bless=back withdraw={last.night}",
        "record": str((config.out / serving.FILE).absolute()),
    }


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other nights off a folder. Raises UserError where one is at work."""
    file = make_folder(out) / LOCK
    try:
        with user_error_for_links(file):
            lock = storage_of(file).lock(file, create=True)
    except BlockingIOError:
        raise UserError(f"{out}: another jobs.nightly is at work in it. Wait for it, or stop it.") from None
    with lock:
        tidy(out)
        yield


def _gates(config: NightlyConfig) -> tuple[Gates, dict[str, str]]:
    """The gates, and task → kind of the candidate. Raises UserError for a gate that names nothing real."""
    kinds, dimensions = steps.measured(config)
    of_run = config.run and lstat_regular(config.run, "gates.yaml") and config.run / "gates.yaml"
    path = config.gates or of_run
    if path and config.max_increase != NightlyConfig.model_fields["max_increase"].default:
        raise UserError(
            f"max_increase is for nights without a gates.yaml, and {path} is there: write the bound there, as "
            f"{{metric: ne, change: {{worse_by_at_most: {config.max_increase:g}}}}}, and leave max_increase out."
        )
    gates = load_gates(path) if path else default_gates(kinds, config.max_increase)
    check_gates(gates, kinds, dimensions, str(path or "max_increase"))
    return gates, kinds


def _judge(config: NightlyConfig, recorder: Recorder, gates: Gates, kinds: dict[str, str]) -> tuple[Outcome, str]:
    """All steps to the verdict. Returns the outcome, and why, in a line. Raises UserError, Preempted."""
    chosen = _choose(config, recorder, kinds)
    of_roles = steps.origins(config, chosen)
    keys = {role: (origin.key, str(origin.dataset.encoded_by)) for role, origin in of_roles.items()}
    encoded = _preprocess(config, recorder, {"input": config.input, "days": str(config.days), "keys": keys}, of_roles)
    days = {role: encoded.manifests[folder] for role, folder in encoded.folders.items()}

    checked = _check(config, recorder, encoded, of_roles["candidate"])
    if checked.refused:
        violations = checked.violations
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        return "undecided", f"undecided: the day's data: {violations[0]}{more}"

    candidate = chosen.candidate or _train(config, recorder, chosen, kinds)
    ours = _evaluate(config, recorder, "candidate", candidate, encoded)
    theirs = _evaluate(config, recorder, "serving", chosen.serving, encoded) if chosen.serving else None
    if chosen.best:
        _evaluate(config, recorder, "best", chosen.best, encoded)
    models = {
        **{"candidate": candidate.model_dump(), "serving": chosen.serving and chosen.serving.model_dump()},
        **{"days": [days["candidate"], days.get("serving")], "measure": _measured_with(config)},
    }
    if theirs and of_roles["serving"].ids != of_roles["candidate"].ids:
        theirs = comparable(theirs)
    if theirs:
        recorder.step("compare", models, lambda: steps.compare(ours, theirs))

    def verdict() -> dict[str, Any]:
        found = judge(gates, kinds, ours, theirs)
        return {"outcome": found.outcome, "gates": [_plain(asdict(gate)) for gate in found.gates]}

    of_gates = {**models, "gates": gates.model_dump(mode="json")}
    recorder.step("gates", of_gates, verdict)
    found = verdict_of(recorder.night)
    assert found is not None
    of_report = {**of_gates, "best": chosen.best and chosen.best.model_dump(), "data": checked.violations}
    recorder.step("report", of_report, lambda: _report(config, recorder.current(), found, kinds))
    return found.outcome, found.line


def _report(config: NightlyConfig, night: Night, verdict: Verdict, kinds: dict[str, str]) -> dict[str, Any]:
    """Writes the page of the night; one that cannot be drawn is a warning, since the verdict stands without it."""
    try:
        return {"page": str(pages.write_night(night, verdict, kinds, config.folder))}
    except (UserError, OSError) as error:
        logger.warning("%s: no page of the night: %s", config.folder, error)
        return {"error": one_line(error)}


def _trend_page(config: NightlyConfig, found: Trend, kinds: dict[str, str]) -> None:
    """Writes the page of all nights; as with that of the night, the verdict stands without it."""
    try:
        pages.write_trend(found, kinds, config.out)
    except (UserError, OSError) as error:
        logger.warning("%s: no page of all nights: %s", config.out, error)


def verdict_of(night: Night) -> Verdict | None:
    """The verdict of a night's gates; None where it did not come to them. Raises UserError for a damaged one."""
    found = night.summary("gates")
    try:
        return None if found is None else TypeAdapter(Verdict).validate_python(found)
    except ValidationError as error:
        raise UserError(f"{night.date}/{FILE}: gates: {first_fault(error)}. Set again=true to judge it anew.") from None


def _choose(config: NightlyConfig, recorder: Recorder, kinds: dict[str, str]) -> steps.Chosen:
    """The models of the night.

    Chosen again where one of them is not there any more, another one serves, or a training has other nights or days before it.
    """
    pointer = serving.read_serving(config.out)
    served = None if config.serving else serving.before(pointer, config.date)
    if served:
        serving.check_there(served, config.out)
    where = config.folder / FILE
    if (known := recorder.night.summary("models")) and not steps.still_there(validated(steps.Chosen, known, where)):
        recorder.forget("models")
    settings = config.model_dump(
        mode="json", include={"run", "step", "train", "days", "serving", "serving_step", "best"}
    )
    others = [night for night in nights(config.out) if night.date != config.date]
    earlier = [
        night for night in others if not serving.is_of_withdrawn(pointer, night)
    ]  # whose weights no training starts from
    inputs = {**settings, "served": served and served.model_dump(exclude={"time"})}
    if config.train:
        inputs["nights"] = [
            [night.date, night.outcome, night.summary("train"), night.summary("check")] for night in earlier
        ]
        inputs["days_before"] = [str(day) for day in earlier_days(config)]
    found = recorder.step("models", inputs, lambda: steps.choose(config, kinds, served, earlier).model_dump())
    return validated(steps.Chosen, found, where)


def _preprocess(
    config: NightlyConfig, recorder: Recorder, inputs: Any, of_roles: dict[str, steps.Origin]
) -> steps.Encoded:
    where = config.folder / FILE
    if (known := recorder.night.summary("preprocess")) and not validated(steps.Encoded, known, where).there():
        recorder.forget("preprocess")
    found = recorder.step("preprocess", inputs, lambda: steps.preprocess(config, of_roles).model_dump())
    return validated(steps.Encoded, found, where)


def _check(config: NightlyConfig, recorder: Recorder, encoded: steps.Encoded, origin: steps.Origin) -> Checked:
    before = rows_of_nights([*nights(config.out)], config.date, config.data_gates.nights)
    inputs = {
        "day": encoded.manifests[encoded.folders["candidate"]],
        "reference": identity(origin.dataset.encoded_by),
        "rows_before": before,
        "data_gates": config.data_gates.model_dump(),
    }
    found = recorder.step("check", inputs, lambda: steps.check(config, encoded, origin, before))
    return validated(Checked, found, config.folder / FILE)


def _train(config: NightlyConfig, recorder: Recorder, chosen: steps.Chosen, kinds: dict[str, str]) -> ModelReference:
    assert config.train is not None
    assert chosen.days is not None
    where = config.folder / FILE
    if known := recorder.night.summary("train"):
        model = validated(ModelReference, known["model"], where)
        if not steps.still_there(steps.Chosen(candidate=model)):
            recorder.forget("train")
    inputs = {
        "train": config.train.model_dump(mode="json"), "start": chosen.start, "folder": str(config.days),
        "data": data_of(config, chosen.days),
    }  # fmt: skip
    found = recorder.step("train", inputs, lambda: steps.train(config, chosen, kinds))
    return validated(ModelReference, found["model"], where)


def _evaluate(
    config: NightlyConfig, recorder: Recorder, role: str, model: ModelReference, encoded: steps.Encoded
) -> Evaluated:
    """The figures of a role's checkpoint, scored now or before."""
    name, file = f"evaluate {role}", config.folder / f"{role}.parquet"
    if recorder.night.summary(name) and not file.exists():
        recorder.forget(name)
    day = encoded.manifests[encoded.folders[role]]
    inputs = {
        "model": model.model_dump(),
        "day": day,
        "measure": _measured_with(config),
    }
    recorder.step(name, inputs, lambda: steps.evaluate(config, role, model, encoded))
    return figures.read(file)


def _measured_with(config: NightlyConfig) -> dict[str, Any]:
    """The settings that figures depend on."""
    how = config.model_dump(mode="json", include={"batch_size", "tables", "table_precision"})
    return {**config.measure.model_dump(mode="json"), **how}


def _bless(config: NightlyConfig, recorder: Recorder) -> None:
    """Moves the pointer to the candidate, once: `back` is not undone by the same command, which then says so."""
    candidate = recorder.night.scored("candidate")
    assert candidate is not None
    model = candidate.model
    withdrawn = serving.is_withdrawn(serving.read_serving(config.out), model)
    inputs = {"candidate": model.model_dump(), "judged": recorder.night.judged, "withdrawn": withdrawn}
    recorder.step(
        "bless",
        inputs,
        lambda: {"what": serving.bless(config.out, model, config.date, "pass", config.keep_served)},
    )


def _plain(gate: dict[str, Any]) -> dict[str, Any]:
    """A gate for JSON, which has no infinite bounds."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in gate.items()}
