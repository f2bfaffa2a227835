"""Where is it bad? Slices in order of harm (pipeline.evaluation.report.harm), with rows and intervals."""

from collections.abc import Sequence
from itertools import chain

from markupsafe import Markup

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import Block, Cell, Note, Section, Table, number, text
from pipeline.evaluation.report.content import Estimate, Model
from pipeline.evaluation.report.estimates import label, pairs
from pipeline.evaluation.report.harm import Harm, harms
from pipeline.evaluation.report.numbers import NOTHING, count, difference, figure, percent, significant
from pipeline.run.headline import HEADLINE

FIRST = 12  # slices of a task that are shown at once


def section(models: Sequence[Model], baseline: Model | None) -> Section:
    """The section; of a comparison, the slices of each model against the baseline."""
    measured = [model.evaluated for model in models if model is not baseline and model.evaluated]
    minimum = " or ".join(count(rows) for rows in sorted({found.provenance.min_rows for found in measured}))
    blocks: list[Block] = []
    found: list[Harm] = []
    for model in models:
        if model is baseline or model.evaluated is None:
            continue
        against = baseline if baseline and pairs(model, baseline) else None
        for task, kind in model.kinds.items():
            theirs, least = against.evaluated if against else None, model.evaluated.provenance.min_rows
            ranked = harms(model.evaluated, task, kind, theirs, least)
            found += ranked
            if ranked:
                title = task if len(models) == 1 else f"{task}: {model.name}"
                blocks.append(_table(ranked, title, label(kind, HEADLINE[kind]), against))
    if not found:
        why = f"No slice has {minimum} observed rows." if measured else "The evaluation kept no figures of slices."
        return Section("slices", "Where is it bad?", why, [Note("slices of jobs.evaluate names further ones.")])
    compared = baseline if any(baseline and m is not baseline and pairs(m, baseline) for m in models) else None
    return Section("slices", "Where is it bad?", _lead(found), [*blocks, Note(_definition(compared, minimum))])


def _lead(found: Sequence[Harm]) -> str:
    judged = [one for one in found if one.harm.low is not None]
    harmful = sum(one.harm.low is not None and one.harm.low > 0 for one in judged)
    chance = len(judged) * 0.025
    return (
        f"{harmful} of {count(len(judged))} figures of slices do harm, with a 95% interval above 0; by chance alone it would "
        f"be about {significant(chance, 2)}."
    )


def _definition(baseline: Model | None, minimum: str) -> str:
    reference = f"as good as {baseline.name} there" if baseline else "as good as the rest, relative to its mean label"
    return (
        f"Harm: by how much the metric of all rows would fall if the slice were {reference}. Slices overlap, so harms do not "
        f"add up. Slices of fewer than {minimum} observed rows are not listed (min_rows)."
    )


def _table(ranked: Sequence[Harm], title: str, metric: str, baseline: Model | None) -> Table:
    reference = f"{metric} of {baseline.name}" if baseline else f"{metric} of the rest"
    header = ["slice", "harm", "", "95% interval", metric, "95% interval", reference, "rows", "share"]
    shown = [x for one in ranked for x in one.harm if x is not None]
    axis = svg.Axis(*svg.span([*shown, 0.0], 0.02), 3, 117)
    return Table(header, [_line(one, axis) for one in ranked], title, 1, FIRST, f"more slices of {title}")


def _line(one: Harm, axis: svg.Axis) -> list[Cell]:
    clear = one.harm.low is not None and one.harm.high is not None and (one.harm.low > 0 or one.harm.high < 0)
    style = ("worse" if (one.harm.value or 0) > 0 else "better") if clear else ""
    harm, value = difference(one.harm), figure(one.value)
    return [
        text(one.name, "strong" if style == "worse" else ""),
        number(harm.value, one.harm.value, style),
        Cell(_mini(one.harm, axis, "c1" if style == "worse" else "c2" if style else "base")),
        text(harm.interval, "none" if harm.interval == NOTHING else ""),
        number(value.value, one.value.value),
        text(value.interval, "quiet"),
        number(significant(one.reference), one.reference),
        number(count(one.rows), one.rows),
        number(percent(one.share), one.share),
    ]


def _mini(found: Estimate, axis: svg.Axis, style: str) -> Markup:
    zero = svg.element("line", x1=axis.at(0), x2=axis.at(0), y1=0, y2=16, class_="zero")
    if found.value is None:
        return Markup("")
    parts = [zero]
    if found.low is not None and found.high is not None:
        parts.append(svg.level_bar(8, axis.at(found.low), axis.at(found.high), style))
    parts.append(svg.dot(axis.at(found.value), 8, style, "", 3.2))
    return svg.element("svg", *chain(parts), viewBox="0 0 120 16", class_="mini", aria_hidden="true")
