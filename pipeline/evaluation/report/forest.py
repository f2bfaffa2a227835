"""A forest plot: estimates below each other, each a name, a point and its 95% interval."""

from collections.abc import Sequence

from markupsafe import Markup

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.content import Estimate
from pipeline.evaluation.report.numbers import difference, figure


def forest(rows: Sequence[tuple[str, Estimate, str]], percents: bool = False, is_change: bool = False) -> Markup:
    """The drawing of rows of name, estimate and style.

    Args:
        is_change: estimates have a sign, and 0 is marked. percents: so are these, and they are shown in percent.
    """
    is_change = is_change or percents
    scale = 100.0 if percents else 1.0
    low, high = svg.span([scale * x for _, e, _ in rows for x in e if x is not None] + ([0.0] if is_change else []))
    left, height = 118.0, 22 * len(rows)
    x, y = svg.Axis(low, high, left, 350), svg.Axis(0, 1, height + 12, 8)
    ticks = x.ticks()
    parts = []
    for tick in ticks:
        at = x.at(tick)
        parts.append(
            svg.element("line", x1=at, x2=at, y1=4, y2=y.start, class_="zero" if is_change and tick == 0 else "grid")
        )
        parts.append(svg.element("text", svg.tick_label(tick, ticks), x=at, y=y.start + 14, class_="middle"))
    parts.append(svg.element("text", "%" if percents else "", x=356, y=y.start + 14, class_="end"))
    for index, (name, found, style) in enumerate(rows):
        at = 19 + 22 * index
        shown = name if len(name) <= 18 else f"…{name[-17:]}"
        parts.append(svg.element("text", svg.element("title", name), shown, x=left - 8, y=at + 3.5, class_="end"))
        if found.value is None:
            continue
        if found.low is not None and found.high is not None:
            parts.append(svg.level_bar(at, x.at(scale * found.low), x.at(scale * found.high), style))
        tip = f"{name}: {difference(found, '%' if percents else '') if is_change else figure(found)}"
        parts.append(svg.dot(x.at(scale * found.value), at, f"{style} hollow" if style == "base" else style, tip, 4))
    return svg.drawing(360, height + 32, "estimates with intervals", *parts)
