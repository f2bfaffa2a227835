"""The pages of a night and of all nights, OUT/DATE/report.html and OUT/trend.html."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.evaluation.metrics import evaluated
from pipeline.evaluation.report import content, page
from pipeline.evaluation.report.content import Check, Estimate, Gate, Judgement, Model, TrendNight
from pipeline.evaluation.report.reading import train_lines
from pipeline.release.night import Figure, Night, Scored
from pipeline.release.scoring import comparable
from pipeline.release.trend import ROLES, NightPoint, Trend
from pipeline.release.verdict import Verdict
from pipeline.run.run import Run
from pipeline.storage.store_path import place

NIGHT, TREND = "report.html", "trend.html"


def write_night(night: Night, verdict: Verdict, kinds: Mapping[str, str], folder: Path) -> Path:
    """Writes the page of a night that was scored. Returns its path.

    Args:
        kinds: task → kind. folder: of the night.
    Raises:
        UserError: a file of a run or of the night is damaged.
    """
    models = {
        role: _model(scored, kinds, folder)
        for role in ("candidate", "serving", "best")
        if (scored := night.scored(role)) is not None
    }
    ours, theirs = night.scored("candidate"), night.scored("serving")
    if ours and theirs and ours.day != theirs.day and (figures := models["serving"].evaluated):
        models["serving"] = replace(models["serving"], evaluated=comparable(figures))
    violations = (night.summary("check") or {}).get("violations", [])
    checks = [Check("data", "undecided", str(line)) for line in violations] or [Check("data", "pass")]
    steps = [(step.name, f"{step.state} in {step.seconds:.1f} s") for step in night.steps if step.seconds is not None]
    content_of_night = content.Night(
        night.date, models["candidate"], _judgement(verdict), models.get("serving"), models.get("best"), checks, steps
    )
    page.write_night(content_of_night, folder / NIGHT)
    return folder / NIGHT


def write_trend(found: Trend, kinds: Mapping[str, str], out: Path) -> Path:
    """Writes the page of all nights. Returns its path."""
    alarms = [f"{point.date}: {alarm}" for point in found.nights for alarm in point.alarms]
    nights = [_night(point) for point in found.nights]
    page.write_trend(content.Trend(out.absolute().name, kinds, nights, alarms), out / TREND)
    return out / TREND


def _model(scored: Scored, kinds: Mapping[str, str], folder: Path) -> Model:
    run = Run(place(scored.model.run))
    return Model(
        name=run.path.resolve().name,
        split="all",
        dataset=scored.day,
        kinds=kinds,
        records=[scored.record],
        evaluated=evaluated.read(folder / scored.file),
        training=train_lines(run.train_metrics),
        progressive=train_lines(run.progressive),
        config=run.config(),
        facts=[("run", scored.model.run)],
    )


def _judgement(verdict: Verdict) -> Judgement:
    gates = [
        Gate(
            gate.gate, gate.task, gate.metric, gate.slice, Estimate(gate.estimate, gate.low, gate.high), gate.judged,
            gate.outcome, gate.why,
        )
        for gate in verdict.worst_first
    ]  # fmt: skip
    return Judgement(verdict.outcome, verdict.line, gates)


def _night(point: NightPoint) -> TrendNight:
    models = {"candidate": point.candidate, "serving": point.serving}
    figures = {
        role: {task: _estimate(figure) for task, figure in scored.figures.items()}
        for role in ROLES
        if (scored := models[role]) is not None
    }
    names = {role: str(scored.model) if (scored := models[role]) else None for role in ROLES}
    return TrendNight(point.date, point.outcome, names["candidate"] or "-", names["serving"], figures, point.why)


def _estimate(figure: Figure) -> Estimate:
    return Estimate(figure.value, figure.low, figure.high)
