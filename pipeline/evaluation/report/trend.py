"""Many nights: each task's headline metric by night, alarms, and the verdicts."""

from collections.abc import Sequence

from markupsafe import Markup

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import Banner, Block, Drawing, Drawings, Section, Table, number, text
from pipeline.evaluation.report.content import Estimate, Trend, TrendNight
from pipeline.evaluation.report.estimates import label
from pipeline.evaluation.report.numbers import count, figure, significant
from pipeline.run.headline import HEADLINE

ROLES = (("serving", "c1"), ("candidate", "c0"))


def sections(trend: Trend) -> list[Section]:
    """The sections of a page of nights."""
    nights = trend.nights
    passed = sum(night.outcome == "pass" for night in nights)
    metrics = " and ".join(dict.fromkeys(label(kind, HEADLINE[kind]) for kind in trend.kinds.values()))
    charts = [
        Drawing(task, over_nights(nights, task, label(kind, HEADLINE[kind])), "95% intervals")
        for task, kind in trend.kinds.items()
    ]
    blocks: list[Block] = [*(Banner("alarm", line) for line in trend.alarms), Drawings(charts, f"{metrics} by night")]
    alarms = f"{len(trend.alarms)} alarm{'s' if len(trend.alarms) > 1 else ''}" if trend.alarms else "no alarms"
    lead = f"{count(passed)} of {count(len(nights))} nights passed; {alarms}."
    table = Table(
        _header(trend), [_line(night, trend) for night in reversed(nights)], "Nights", 4, 31, "earlier nights"
    )
    return [
        Section("good", "Is it good?", lead, blocks),
        Section("nights", "What was judged?", "The newest night first.", [table]),
    ]


def _header(trend: Trend) -> list[str]:
    figures = [f"{task} {role}" for task in trend.kinds for role, _ in ROLES]
    return ["night", "verdict", "candidate", "serving", *figures, "why"]


def _line(night: TrendNight, trend: Trend) -> list:
    cells = [text(night.date), text(night.outcome, night.outcome), text(night.candidate), text(night.serving or "–")]
    for task in trend.kinds:
        for role, _ in ROLES:
            one = night.figures.get(role, {}).get(task, Estimate())
            cells.append(number(significant(one.value), one.value))
    return [*cells, text(night.summary, "name")]


def over_nights(nights: Sequence[TrendNight], task: str, metric: str) -> Markup:
    """A task's headline metric of candidate and serving model, night by night, with bands of intervals."""
    found = {role: [night.figures.get(role, {}).get(task, Estimate()) for night in nights] for role, _ in ROLES}
    low, high = svg.span([x for series in found.values() for one in series for x in one], 0.1)
    x, y = svg.Axis(0, max(len(nights) - 1, 1), 46, 276), svg.Axis(low, high, 176, 26)
    parts, ends = [_dates(nights, x, y, metric)], []
    for role, style in ROLES:
        kept = [(x.at(i), one, nights[i].date) for i, one in enumerate(found[role]) if one.value is not None]
        known = [(at, one.low, one.high) for at, one, _ in kept if one.low is not None and one.high is not None]
        parts.append(svg.band([(at, y.at(b)) for at, _, b in known], [(at, y.at(a)) for at, a, _ in known], style))
        parts.append(svg.polyline([(at, y.at(one.value or 0.0)) for at, one, _ in kept], style))
        for at, one, date in kept:
            parts.append(svg.dot(at, y.at(one.value or 0.0), style, f"{role}, {date}: {figure(one)}", 2.8))
        if kept:
            ends.append((y.at(kept[-1][1].value or 0.0), role, style))
    parts.append(svg.labels(ends, 284, 26, 176))
    return svg.drawing(360, 212, f"{metric} of {task} by night", *parts)


def _dates(nights: Sequence[TrendNight], x: svg.Axis, y: svg.Axis, metric: str) -> Markup:
    """The frame, with the first, the middle and the last date below."""
    parts = [svg.element("text", metric, x=x.start, y=y.end - 10, class_="title")]
    ticks = y.ticks()
    for value in ticks:
        parts.append(svg.element("line", x1=x.start, x2=x.end, y1=y.at(value), y2=y.at(value), class_="grid"))
        shown = svg.tick_label(value, ticks)
        parts.append(svg.element("text", shown, x=x.start - 5, y=y.at(value) + 3.5, class_="tick end"))
    parts.append(svg.element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    last = len(nights) - 1
    for index, anchor in (
        {0: None, last // 2: "middle", last: "end"}.items() if last >= 4 else {0: None, last: "end"}.items()
    ):
        parts.append(svg.element("text", nights[index].date, x=x.at(index), y=y.start + 16, class_=anchor))
    return svg.join(parts)
