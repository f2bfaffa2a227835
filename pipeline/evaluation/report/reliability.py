"""Is it calibrated? The ratio of predictions to labels of each task, and mean labels over mean predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.evaluation.metrics.intervals import quantile
from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import Block, Drawing, Drawings, Note, Section, Table, number, text
from pipeline.evaluation.report.content import Estimate, Model
from pipeline.evaluation.report.estimates import CONFIDENCE, estimates
from pipeline.evaluation.report.numbers import count, figure, percent, significant

WIDE = 20.0  # the largest mean prediction over the smallest from which on both axes are logarithmic
NORMAL = 1.96  # standard errors, where the number of buckets is not known


class Bin(NamedTuple):
    """Rows of about the same prediction: their mean prediction and label, the label's standard error, their weight.

    Attributes:
        reach: of the label's 95% interval, in standard errors.
    """

    prediction: float
    label: float
    error: float
    weight: float
    reach: float


def section(models: Sequence[Model]) -> Section:
    """The section; models after the seventh are not drawn."""
    blocks: list[Block] = []
    drawn = models[:7]
    drawings = [
        Drawing(task, curve([(one.name, bins_of(one, task)) for one in drawn]), _caption(models, task))
        for task in models[0].kinds
        if any(bins_of(model, task) for model in drawn)
    ]
    if len(models) > 1:
        blocks.append(_ratios(models))
    if drawings:
        blocks.append(Drawings(drawings, "Mean label over mean prediction"))
        blocks.append(
            Note(
                "Rows in order of their prediction, in bins of about equal weight; bars are 95% intervals of the mean label, "
                "the dashed line is perfect calibration. Above it predictions are too low."
                + _without_curve(models[0].kinds)
            )
        )
    else:
        blocks.append(Note("The evaluations kept no reliability curves."))
    return Section("calibrated", "Is it calibrated?", _lead(models), blocks)


def _without_curve(kinds: Mapping[str, str]) -> str:
    found = [task for task, kind in kinds.items() if kind != "binary"]
    return f" Curves are of binary tasks; of {', '.join(found)} there is the ratio." if found else ""


def _ratios(models: Sequence[Model]) -> Table:
    """A line a model: each task's calibration."""
    header, lines = ["model"], []
    for task in models[0].kinds:
        header += [task, "95% interval"]
    for model in models:
        found, line = estimates(model), [text(model.name)]
        for task in models[0].kinds:
            one = found.get((task, "calibration"), Estimate())
            line += [
                number(figure(one).value, one.value, "worse" if _is_off(one) else ""),
                text(figure(one).interval, "quiet"),
            ]
        lines.append(line)
    return Table(header, lines)


def bins_of(model: Model, task: str) -> list[Bin]:
    """The bins that the newest record has of a task."""
    found: Any = (model.last.get("reliability") or {}).get(task) or []
    return [_bin(row, model.last.get("buckets") or 0) for row in found]


def _bin(row: Sequence[float | None], buckets: int) -> Bin:
    """A bin; `buckets` are those of a record of early versions, whose bins do not have how many have rows of them."""
    prediction, label, error, weight = (float("nan") if x is None else float(x) for x in row[:4])
    used = int((row[4] if len(row) > 4 else buckets) or 0)
    return Bin(prediction, label, error, weight, float(quantile(CONFIDENCE, used)) if used > 1 else NORMAL)


def _lead(models: Sequence[Model]) -> str:
    ratio = "Sum of predictions over sum of labels, 1 is calibrated"
    if len(models) > 1:
        return f"{ratio}; in colour where the 95% interval leaves out 1."
    found = estimates(models[0])
    known = {
        task: one for task in models[0].kinds if (one := found.get((task, "calibration"), Estimate())).value is not None
    }
    off = [task for task, one in known.items() if _is_off(one)]
    clear = f"; the interval leaves out 1 for {', '.join(off)}" if off else ""
    return f"{ratio}: {', '.join(f'{task} {figure(one)}' for task, one in known.items())}{clear}." if known else ""


def _is_off(one: Estimate) -> bool:
    return one.low is not None and one.high is not None and not one.low <= 1 <= one.high


def _caption(models: Sequence[Model], task: str) -> str:
    found = [(model.name, estimates(model).get((task, "ece"), Estimate()).value) for model in models[:7]]
    shown = [f"{name} {significant(x)}" if len(models) > 1 else significant(x) for name, x in found if x is not None]
    return f"Expected calibration error {', '.join(shown)}" if shown else ""


def curve(series: Sequence[tuple[str, Sequence[Bin]]]) -> Markup:
    """Reliability curves (name, bins) in one chart, on logarithmic axes if wide."""
    points = [b for _, bins in series for b in bins if b.prediction == b.prediction and b.label == b.label]
    positive = [b.prediction for b in points if b.prediction > 0]
    log = len(positive) == len(points) and bool(positive) and max(positive) > WIDE * min(positive)
    top = min(1.0, 1.15 * max((max(b.prediction, b.label) for b in points), default=1.0)) or 1.0
    # Labels of a bin may all be 0, which has no place on a logarithmic axis: it is drawn at its lower end.
    labelled = [b.label for b in points if b.label > 0]
    floor = 0.7 * min([*positive, *[x for x in labelled if x > 0.3 * min(positive)]]) if log else 0.0
    x, y = svg.Axis(floor, top, 46, 286, log), svg.Axis(floor, top, 196, 26, log)
    parts = [svg.frame(x, y, "mean prediction", "mean label")]
    parts.append(svg.element("line", x1=x.at(floor), y1=y.at(floor), x2=x.at(top), y2=y.at(top), class_="ideal"))
    ends = []
    for index, (name, bins) in enumerate(series):
        style = f"c{index}"
        kept = [b for b in bins if b.prediction == b.prediction and b.label == b.label]
        parts.append(svg.polyline([(x.at(b.prediction), y.at(b.label)) for b in kept], f"{style} thin"))
        for b in kept:
            at, low, high = x.at(b.prediction), b.label - b.reach * b.error, b.label + b.reach * b.error
            if b.error == b.error:
                parts.append(svg.upright_bar(at, y.at(max(low, floor)), y.at(min(high, top)), style))
            parts.append(svg.dot(at, y.at(b.label), style, _tip(name if len(series) > 1 else "", b, low, high), 2.8))
        if kept:
            ends.append((y.at(kept[-1].label), name if len(name) <= 11 else f"…{name[-10:]}", style))
    if len(series) > 1:
        parts.append(svg.labels(ends, 292, 26, 196))
    return svg.drawing(360, 232, "reliability curve", *parts)


def _tip(name: str, b: Bin, low: float, high: float) -> str:
    bounds = f" [{percent(low)}, {percent(high)}]" if b.error == b.error else ""
    lines = [name, f"mean prediction {percent(b.prediction)}", f"mean label {percent(b.label)}{bounds}"]
    return "\n".join(filter(None, [*lines, f"weight {count(b.weight)}"])).replace("\n", "; ")
