"""Is it good? The verdict and its gates, each task's headline metric with its interval, and the change to a baseline."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import (
    Banner,
    Block,
    Card,
    Cards,
    Cell,
    Drawing,
    Drawings,
    Section,
    Table,
    number,
    text,
)
from pipeline.evaluation.report.content import Check, Estimate, Gate, Judgement, Model
from pipeline.evaluation.report.estimates import (
    MEAN_LABEL,
    Change,
    changes,
    direction,
    estimates,
    label,
    mean_label_beaten,
    pairs,
    undefined,
)
from pipeline.evaluation.report.forest import forest
from pipeline.evaluation.report.numbers import NOTHING, count, difference, figure, percent, significant
from pipeline.evaluation.report.tables import closed_gap
from pipeline.run.headline import HEADLINE, RANKING

COUNTS = ("rows", "non_finite", "positives", "weight_sum")  # metrics that count, without interval or change
Found = Mapping[tuple[str, str], Estimate]
Changes = Mapping[tuple[str, str], Change]


def section(
    models: Sequence[Model], baseline: Model | None, judgement: Judgement | None = None, checks: Sequence[Check] = ()
) -> Section:
    """The first section of a page of one model or several."""
    blocks: list[Block] = []
    if judgement:
        blocks += [Banner(judgement.outcome, judgement.summary), *_gates(judgement.gates)]
    if checks:
        lines = [[text(check.name), text(check.outcome, check.outcome), text(check.why, "name")] for check in checks]
        blocks.append(Table(["check", "outcome", "why"], lines, "Checks of the day's data", names=2))
    others = [model for model in models if model is not baseline]
    by_model = {model.name: changes(model, baseline) for model in others if baseline}
    if len(models) == 1:
        [model] = models
        found = estimates(model)
        blocks.append(Cards([_card(model, task, found, by_model.get(model.name), baseline) for task in model.kinds]))
    else:
        blocks += _comparison(models, baseline, by_model)
    blocks += [_all_metrics(model, by_model.get(model.name), baseline, len(models) == 1) for model in models]
    return Section(
        "good", "Is it good?", _lead(models[0] if len(models) == 1 else None, others, by_model, baseline), blocks
    )


def _lead(one: Model | None, others: Sequence[Model], by_model: Mapping[str, Changes], baseline: Model | None) -> str:
    parts = []
    if one:
        found = estimates(one)
        good = sum(mean_label_beaten(found, task, HEADLINE[kind]) for task, kind in one.kinds.items())
        names = " and ".join(dict.fromkeys(label(kind, HEADLINE[kind]) for kind in one.kinds.values()))
        parts.append(
            f"{good} of {len(one.kinds)} tasks {'is' if good == 1 else 'are'} better than predicting the mean label: {names} "
            f"below {MEAN_LABEL:g}. Lower is better."
        )
        if reasons := undefined(one):
            parts.append(f"Undefined: {', '.join(f'{task} ({why})' for task, why in reasons.items())}.")
    for model in others if baseline else ():
        ways = [_way(model, task, by_model[model.name]) for task in model.kinds]
        if any(by_model[model.name][key].delta.low is not None for key in by_model[model.name]):
            assert baseline is not None
            parts.append(
                f"{model.name} against {baseline.name}: {ways.count('better')} better, {ways.count('worse')} worse, "
                f"{ways.count('')} without a clear difference."
            )
    if baseline and any(not pairs(model, baseline) for model in others):
        parts.append("Changes without an interval are of evaluations that cannot be paired bucket by bucket.")
    return " ".join(parts)


def _way(model: Model, task: str, changed: Changes) -> str:
    key = (task, HEADLINE[model.kinds[task]])
    return direction(changed[key].relative, False) if key in changed else ""


def _gates(gates: Sequence[Gate]) -> list[Block]:
    if not gates:
        return []
    header = ["gate", "outcome", "task", "metric", "slice", "value", "95% interval", "bound", "why"]
    lines = [
        [
            text(gate.name), text(gate.outcome, gate.outcome), text(gate.task), text(gate.metric), text(gate.of_slice),
            number(figure(gate.estimate).value, gate.estimate.value), text(figure(gate.estimate).interval),
            text(gate.bound, "name"), text(gate.why, "name"),
        ]
        for gate in gates
    ]  # fmt: skip
    return [Table(header, lines, "Gates", names=5)]


def _card(model: Model, task: str, found: Found, changed: Changes | None, baseline: Model | None) -> Card:
    kind = model.kinds[task]
    name = HEADLINE[kind]
    value, best = found.get((task, name), Estimate()), model.best_of(task)
    lines, theirs = [], None
    if changed and baseline and (change := changed.get((task, name))):
        theirs = change.theirs
        lines.append((f"change to {baseline.name}", str(difference(change.relative, "%"))))
    if best is not None:
        lines.append(("best possible", f"{significant(best)}, gap closed {percent(closed_gap(value.value, best))}"))
    further = [other for other in (RANKING[kind], "calibration") if (task, other) in found]
    lines += [(label(kind, other), str(figure(found[task, other]))) for other in further]
    lines.append(("rows", count(found.get((task, "rows"), Estimate()).value)))
    shown = figure(value)
    below = undefined(model).get(task, "no interval was kept")
    below = f"95% interval {shown.interval}" if shown.interval != NOTHING else below
    return Card(task, shown.value, label(kind, name), below, _place(value, best, theirs, baseline), lines)


def _place(value: Estimate, best: float | None, theirs: float | None, baseline: Model | None) -> Markup:
    """A headline metric on the way from the mean label's value to the best possible one."""
    if value.value is None:
        return Markup("")
    low, high = svg.span([value.value, value.low, value.high, best, theirs, MEAN_LABEL], 0.03)
    x = svg.Axis(low, high, 6, 314)
    parts = [svg.element("line", x1=6, x2=314, y1=26, y2=26, class_="axis")]
    for place, words, anchor in ((MEAN_LABEL, "mean label 1", "end"), (best, "best possible", "")):
        if place is not None:
            at = x.at(place)
            parts.append(svg.upright_bar(at, 20, 32, "base"))
            parts.append(svg.element("text", words, x=at if anchor else max(at - 2, 0), y=12, class_=anchor or None))
    if theirs is not None and baseline:
        tip = f"{baseline.name}: {significant(theirs)}"
        parts.append(svg.dot(x.at(theirs), 26, "base hollow", tip, 4))
    if value.low is not None and value.high is not None:
        parts.append(svg.level_bar(26, x.at(value.low), x.at(value.high), "c0"))
    parts.append(svg.dot(x.at(value.value), 26, "c0", str(figure(value)), 4.5))
    return svg.drawing(320, 38, f"headline metric {significant(value.value)}", *parts)


def _comparison(models: Sequence[Model], baseline: Model | None, by_model: Mapping[str, Changes]) -> list[Block]:
    """Per task the change of each model to the baseline; without one, each model's headline metric."""
    kinds = models[0].kinds
    found = {model.name: estimates(model) for model in models}
    drawings = []
    for task, kind in kinds.items():
        name = HEADLINE[kind]
        rows = []
        for index, model in enumerate(models):
            if model is baseline:
                rows.append((model.name, Estimate(0.0), "base"))
            elif baseline:
                change = by_model[model.name].get((task, name))
                rows.append((model.name, change.relative if change else Estimate(), f"c{index % 7}"))
            else:
                rows.append((model.name, found[model.name].get((task, name), Estimate()), f"c{index % 7}"))
        title = f"{task}: change of {label(kind, name)}" if baseline else f"{task}: {label(kind, name)}"
        drawings.append(Drawing(title, forest(rows, percents=baseline is not None)))
    about = f"Change to {baseline.name}, 95% intervals" if baseline else "95% intervals"
    tables = [_models_of_task(models, task, found, by_model, baseline) for task in kinds]
    return [Drawings(drawings, f"{about}; left is better"), *tables]


def _models_of_task(
    models: Sequence[Model],
    task: str,
    found: Mapping[str, Found],
    by_model: Mapping[str, Changes],
    baseline: Model | None,
) -> Table:
    """One task: a line a model, the best first."""
    kind = models[0].kinds[task]
    names = (HEADLINE[kind], RANKING[kind])
    header = ["model"]
    for name in names:
        header += [label(kind, name), "95% interval"]
        header += ["change", "95% interval of the change"] if baseline and name == names[0] else []
    lines = []
    for model in models:
        line = [text(model.name, "strong" if model is baseline else "")]
        for name in names:
            one = found[model.name].get((task, name), Estimate())
            line += [number(figure(one).value, one.value), text(figure(one).interval, "quiet")]
            if baseline and name == names[0]:
                change = by_model.get(model.name, {}).get((task, name), Change(None, Estimate(), Estimate())).relative
                shown = difference(change, "%")
                line += [number(shown.value, change.value, direction(change, False)), text(shown.interval, "quiet")]
        lines.append(line)
    lines.sort(key=lambda line: float("inf") if line[1].key is None else line[1].key)
    return Table(header, lines, task)


def _all_metrics(model: Model, changed: Changes | None, baseline: Model | None, opened: bool) -> Table:
    found = estimates(model)
    header = ["task", "metric", "value", "95% interval"]
    header += [baseline.name, "change", "95% interval of the change"] if changed is not None and baseline else []
    shown_first = [
        (task, name) for task, kind in model.kinds.items() for name in (HEADLINE[kind], RANKING[kind], "calibration")
    ]
    keys = [*(key for key in shown_first if key in found), *(key for key in found if key not in shown_first)]
    lines = []
    for task, name in keys:
        one, kind = found[task, name], model.kinds.get(task, "binary")
        counts = name in COUNTS
        shown = count(one.value) if counts else figure(one).value
        line = [text(task), text(label(kind, name)), number(shown, one.value), _bounds(one, counts)]
        if changed is not None and baseline:
            line += _change_cells(changed.get((task, name)), kind, name)
        lines.append(line)
    if not opened:
        return Table(header, lines, "", 2, 0, f"metrics of {model.name}")
    return Table(header, lines, "Metrics", 2, sum(key in found for key in shown_first), "more metrics")


def _bounds(one: Estimate, counts: bool) -> Cell:
    return text("" if counts else figure(one).interval, "none" if one.low is None else "")


def _change_cells(change: Change | None, kind: str, name: str) -> list[Cell]:
    if change is None:
        return [text(""), text(""), text("")]
    if name in COUNTS:
        return [number(count(change.theirs), change.theirs), text(""), text("")]
    metric = METRICS.get(kind, {}).get(name)
    style = direction(change.delta, metric.higher_is_better if metric else None)
    shown = difference(change.delta)
    return [
        number(significant(change.theirs), change.theirs),
        number(shown.value, change.delta.value, style),
        text(shown.interval, "none" if shown.interval == NOTHING else ""),
    ]
