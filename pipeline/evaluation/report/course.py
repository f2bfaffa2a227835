"""How did it get there? The headline metric over training rows, learning rate, throughput and the evaluator's lag."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.evaluation.metrics.intervals import reach_of
from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import Block, Cell, Drawing, Drawings, Section, Table, number, text
from pipeline.evaluation.report.content import Estimate, Model, TrainLine
from pipeline.evaluation.report.estimates import CONFIDENCE, around, label
from pipeline.evaluation.report.numbers import compact, count, figure, significant
from pipeline.evaluation.report.tables import closed_gap
from pipeline.run.headline import HEADLINE, RANKING

DRAWN = 300  # points of a line: more cannot be told apart
LEFT, RIGHT, TOP, BOTTOM = 46.0, 268.0, 26.0, 176.0  # of a chart's inside, in pixels; labels stand right of it
Series = Sequence[tuple[float, float]]


def section(models: Sequence[Model], baseline: Model | None = None) -> Section:
    """The section; models after the seventh are not drawn."""
    drawn = models[:7]
    charts = [Drawing(task, learning_curve(drawn, task, baseline)) for task in models[0].kinds]
    metrics = " and ".join(dict.fromkeys(label(kind, HEADLINE[kind]) for kind in models[0].kinds.values()))
    blocks: list[Block] = [Drawings(charts, f"{metrics} over training rows")]
    rates = [
        _rate(drawn, "Learning rate", "", lambda model: _of_training(model, "lr"), "dense part"),
        _rate(drawn, "Training throughput", "rows/s", lambda model: _of_training(model, "rows_per_s")),
        _rate(
            drawn,
            "Share of the time spent waiting for data",
            "%",
            lambda model: _of_training(model, "data_wait", 100.0),
        ),
        _rate(drawn, "Evaluator's lag behind the trainer", "s", lambda model: _of_records(model, "lag", "seconds")),
        _rate(drawn, "Evaluator's throughput", "rows/s", lambda model: _of_records(model, "rows_per_s")),
    ]
    if known := [rate for rate in rates if rate]:
        blocks.append(Drawings(known))
    blocks += [_checkpoints(model) for model in models if model.records]
    return Section("course", "How did it get there?", _lead(models), blocks)


def _lead(models: Sequence[Model]) -> str:
    parts = []
    for model in models:
        if not model.records:
            continue
        best = [
            f"{task} {significant(value)} at step {count(step)}"
            for task, kind in model.kinds.items()
            for value, step in [
                min(
                    ((r["metrics"][task][HEADLINE[kind]], r["step"]) for r in model.records if _has(r, task, kind)),
                    default=(None, 0),
                )
            ]
            if value is not None
        ]
        name = f"{model.name}: " if len(models) > 1 else ""
        number_of = f"{count(len(model.records))} checkpoint{'s' if len(model.records) > 1 else ''}"
        lowest = f"; lowest {', '.join(best)}" if best else ""
        parts.append(f"{name}{number_of} over {count(model.last.get('rows'))} training rows{lowest}.")
    return " ".join(parts)


def _has(record: Mapping[str, Any], task: str, kind: str) -> bool:
    return record["metrics"].get(task, {}).get(HEADLINE[kind]) is not None


def learning_curve(models: Sequence[Model], task: str, baseline: Model | None = None) -> Markup:
    """One task's headline metric over training rows: evaluations with intervals, training, and the best possible value."""
    kind = models[0].kinds[task]
    name = HEADLINE[kind]
    curves = [(model, _evaluations(model, task)) for model in models]
    best = models[0].best_of(task)
    values = [x for _, points in curves for _, one in points for x in one if x is not None]
    trained = _trained(models[0], task, models[0].training) if len(models) == 1 else []
    # Training begins at the mean label's value; the scale is that of the evaluations, with some room for what it comes from.
    low, high = svg.span([*values, best], 0.12)
    if values and trained:
        high = min(max(high, max(y for _, y in trained)), max(values) + 0.6 * (max(values) - low))
    rows = [x for _, points in curves for x, _ in points] + [x for x, _ in trained]
    x, y = svg.Axis(0, max(rows, default=1) or 1, LEFT, RIGHT), svg.Axis(low, high, BOTTOM, TOP)
    parts, ends = [svg.frame(x, y, "training rows", label(kind, name))], []
    if best is not None and values:
        parts.append(svg.element("line", x1=LEFT, x2=RIGHT, y1=y.at(best), y2=y.at(best), class_="line dashed c2"))
        ends.append((y.at(best), "best possible", "c2"))
    inside = [(x.at(a), y.at(b)) for a, b in trained if low <= b <= high]
    if len(inside) > 1:
        parts.append(svg.polyline(inside, "base thin"))
        ends.append((inside[-1][1], "training", "base"))
    before = _trained(models[0], task, models[0].progressive) if len(models) == 1 else []
    before = [(rows, value) for rows, value in before if low <= value <= high]
    parts += [
        svg.dot(x.at(rows), y.at(value), "c1 hollow", f"progressive: {significant(value)} up to {count(rows)} rows", 3)
        for rows, value in before
    ]
    ends += [(y.at(value), "progressive", "c1") for _, value in before[-1:]]
    for index, (model, points) in enumerate(curves):
        style = "base" if model is baseline else f"c{index}"
        drawn, end = _curve(points, x, y, style, model.name if len(models) > 1 else "")
        parts.append(drawn)
        if end is not None:
            shown = model.split if len(models) == 1 else model.name if len(model.name) <= 13 else f"…{model.name[-12:]}"
            ends.append((end, shown, style))
    parts.append(svg.labels(ends, RIGHT + 7, TOP, BOTTOM))
    return svg.drawing(360, BOTTOM + 36, f"{name} of {task} over training rows", *parts)


def _curve(
    points: Sequence[tuple[int, Estimate]], x: svg.Axis, y: svg.Axis, style: str, name: str
) -> tuple[Markup, float | None]:
    """Evaluations as a line with its band of intervals, and the height of its end."""
    kept = [(rows, one) for rows, one in points if one.value is not None]
    known = [(rows, one.low, one.high) for rows, one in kept if one.low is not None and one.high is not None]
    parts = [
        svg.band([(x.at(r), y.at(high)) for r, _, high in known], [(x.at(r), y.at(low)) for r, low, _ in known], style),
        svg.polyline([(x.at(rows), y.at(one.value or 0.0)) for rows, one in kept], style),
    ]
    for rows, one in kept[:: max(1, len(kept) // DRAWN)]:
        tip = f"{name + ': ' if name else ''}{figure(one)} after {count(rows)} rows"
        parts.append(svg.dot(x.at(rows), y.at(one.value or 0.0), style, tip, 2.8))
    return svg.join(parts), y.at(kept[-1][1].value or 0.0) if kept else None


def _evaluations(model: Model, task: str) -> list[tuple[int, Estimate]]:
    """Training rows and headline metric of each record."""
    name = HEADLINE[model.kinds[task]]
    found = []
    for record in model.records:
        error = (record.get("intervals") or {}).get(task, {}).get(name)
        reach = reach_of(record, task, name, CONFIDENCE)
        found.append((record["rows"], around(record["metrics"].get(task, {}).get(name), error, reach)))
    return found


def _trained(model: Model, task: str, training: Sequence[TrainLine]) -> Series:
    """The same of lines of training: NE; regression: the root of its standardised squared error."""
    lines = _thinned(training)
    if model.kinds[task] == "binary":
        found = [(line.rows, line.ne.get(task)) for line in lines]
    else:
        found = [(line.rows, None if (x := line.task_loss.get(task)) is None or x < 0 else x**0.5) for line in lines]
    return [(float(rows), float(value)) for rows, value in found if value is not None and value == value]


def _thinned(lines: Sequence[TrainLine]) -> Sequence[TrainLine]:
    return lines[:: max(1, len(lines) // DRAWN)]


def _of_training(model: Model, key: str, scale: float = 1.0) -> Series:
    return [(line.rows, scale * line.rates[key]) for line in _thinned(model.training) if key in line.rates]


def _of_records(model: Model, key: str, inner: str | None = None) -> Series:
    found = []
    for record in model.records:
        value = record.get(key)
        value = value.get(inner) if inner and isinstance(value, Mapping) else value
        if isinstance(value, (int, float)) and value == value:
            found.append((float(record["rows"]), float(value)))
    return found


def _rate(
    models: Sequence[Model], title: str, unit: str, of: Callable[[Model], Series], caption: str = ""
) -> Drawing | None:
    """A quantity over training rows, None where no model has it at two places."""
    series = [(index, model, of(model)) for index, model in enumerate(models)]
    series = [item for item in series if len(item[2]) > 1]
    if not series:
        return None
    top = max(value for _, _, points in series for _, value in points)
    x = svg.Axis(0, max(rows for _, _, points in series for rows, _ in points) or 1, LEFT, RIGHT)
    y = svg.Axis(0, 1.08 * top or 1.0, 126, TOP)
    parts, ends = [svg.frame(x, y, "training rows", unit)], []
    for index, model, points in series:
        drawn = [(x.at(a), y.at(b)) for a, b in points]
        parts.append(svg.polyline(drawn, f"c{index}"))
        parts += [
            svg.dot(*place, f"c{index}", f"{significant(value)} {unit} after {count(rows)} rows", 1.8)
            for place, (rows, value) in zip(drawn, points, strict=True)
        ]
        name = (
            compact(points[-1][1])
            if len(models) == 1
            else model.name
            if len(model.name) <= 13
            else f"…{model.name[-12:]}"
        )
        ends.append((drawn[-1][1], name, f"c{index}"))
    parts.append(svg.labels(ends, RIGHT + 7, TOP, 126))
    return Drawing(title, svg.drawing(360, 162, title, *parts), caption)


def _checkpoints(model: Model) -> Table:
    """A line a checkpoint, the newest first, then the best possible values and the share of the gap to them that is closed."""
    columns = [
        (task, name) for task, kind in model.kinds.items() for name in (HEADLINE[kind], RANKING[kind], "calibration")
    ]
    header = ["step", "training rows", *(f"{task} {label(model.kinds[task], name)}" for task, name in columns)]
    lines = []
    for record in reversed(model.records):
        values = [record["metrics"].get(task, {}).get(name) for task, name in columns]
        lines.append([number(count(x), x) for x in (record["step"], record["rows"])] + [_value(x) for x in values])
    if model.best:
        found = [model.best.get(task, {}).get(name) for task, name in columns]
        gaps = [
            closed_gap(model.metric(task), model.best_of(task)) if name == HEADLINE[model.kinds[task]] else None
            for task, name in columns
        ]
        lines.insert(0, [text("best possible", "quiet"), text(""), *(_value(x, "quiet") for x in found)])
        lines.insert(
            1, [text("gap closed", "quiet"), text(""), *(text("" if g is None else f"{g:.0%}", "quiet") for g in gaps)]
        )
    return Table(header, lines, f"Checkpoints of {model.name}", first=14, more="older checkpoints")


def _value(value: float | None, style: str = "") -> Cell:
    return number(significant(value), value, style)
