"""A heat map: a matrix as shades with its numbers."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.numbers import NOTHING, count

# Colours of values, light to dark blue, and of negative ones, light to dark orange; lightness falls evenly.
POSITIVE = ("#f3f7fb", "#d3e4f2", "#a9cbe6", "#79aed6", "#4b8fc2", "#266fa8", "#0e5088", "#053561")
NEGATIVE = ("#fbf3ee", "#f6dccb", "#eebb9a", "#e2956a", "#cf6c3a", "#a94a1c")
UNKNOWN = "#eceff2"
PRINTED = 260  # numbers in the cells; in a heat map of more they would not be legible


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    about: str,
    shown: Callable[[float], str],
    tip: Callable[[int, int], str],
    by_column: bool = False,
) -> Markup:
    """The drawing; names of columns stand upright where they are long.

    Args:
        values: by row and column; None where unknown. about: for a screen reader.
        shown: a value in its cell. tip: the words of the cell of a row and column.
        by_column: the darkest shade is that of the largest value of each column, as columns are of other quantities.
    """
    scales = [
        max((abs(x) for x in column if x is not None), default=0.0) or 1e-12 for column in zip(*values, strict=True)
    ]
    scales = scales if by_column else [max(scales)] * len(columns)
    left = 12 + 6.2 * min(16, max(len(name) for name in rows))
    width, height = (354 - left) / len(columns), 26.0 if len(rows) <= 16 else 14.0
    turned = max(len(name) for name in columns) * 6.2 > width - 4
    head = 14 + (5.9 * min(16, max(len(name) for name in columns)) if turned else 6)
    parts = [_column_name(name, left + (c + 0.5) * width, head, turned) for c, name in enumerate(columns)]
    printed = len(rows) * len(columns) <= PRINTED and width >= 19
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = head + r * height
        words = svg.element("title", name)
        parts.append(svg.element("text", words, _short(name), x=left - 6, y=y + height / 2 + 4, class_="end"))
        for c, value in enumerate(row):
            x, (fill, style) = left + c * width, _shade(value, scales[c])
            title = svg.element("title", tip(r, c))
            parts.append(svg.element("rect", title, x=x, y=y, width=width, height=height, fill=fill, class_="cell"))
            if printed:
                text, place = NOTHING if value is None else shown(value), {"x": x + width / 2, "y": y + height / 2 + 4}
                parts.append(svg.element("text", text, **place, class_=f"middle {style}"))
    size = f"{count(len(rows))} rows by {count(len(columns))} columns"
    return svg.drawing(360, head + len(rows) * height + 6, f"{about}, {size}", *parts)


def _column_name(name: str, x: float, y: float, turned: bool) -> Markup:
    tip = svg.element("title", name)
    if not turned:
        return svg.element("text", tip, _short(name), x=x, y=y - 7, class_="middle")
    return svg.element(
        "text", tip, _short(name), x=x + 3.5, y=y - 6, transform=f"rotate(-90 {x + 3.5:.1f} {y - 6:.1f})"
    )


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _shade(value: float | None, scale: float) -> tuple[str, str]:
    """The colour of a value, and whether text on it is dark or light."""
    if value is None:
        return UNKNOWN, "dark"
    shades = POSITIVE if value >= 0 else NEGATIVE
    index = min(int(abs(value) / scale * len(POSITIVE)), len(shades) - 1)
    return shades[index], "light" if index >= 4 else "dark"
