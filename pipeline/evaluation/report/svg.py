"""Pieces of SVG: elements, axes with round ticks, the frame of a chart, lines, bands and error bars.

Sizes are pixels of a drawing that fills the width of a phone; text in it stays text. Colours are classes of page.css.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from features.printable import printable
from pipeline.evaluation.report.numbers import compact

LINE = 12  # height of a line of text
Point = tuple[float, float]


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """An element; text and attributes are escaped, control characters shown as escapes, a trailing _ of a name dropped."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(child if isinstance(child, Markup) else escape(_text(child)) for child in children)
    return Markup(f"<{tag}{shown}>{inner}</{tag}>")


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else printable(str(value))


def join(parts: Iterable[Markup]) -> Markup:
    """Several elements as one."""
    return Markup("").join(parts)


@dataclass(frozen=True)
class Axis:
    """Values low to high drawn from pixel start to pixel end; log: by their logarithms, low is then above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; of one outside, that of the nearer end."""
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        clipped = min(max(value, self.low), self.high)
        place = math.log(clipped) if self.log else clipped
        return self.start + (self.end - self.start) * (place - low) / ((high - low) or 1.0)

    def ticks(self, wanted: int = 4) -> list[float]:
        """Round values along the axis: multiples of 1, 2 or 5 times a power of ten; on a log axis 1, 2, 5 or powers alone."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            several = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            inside = [value for value in several if self.low <= value <= self.high]
            alone = [value for value in inside if f"{value:e}".startswith("1.0")]
            return alone if len(inside) > 2 * wanted else inside
        return _multiples(self.low, self.high, wanted)


def _multiples(low: float, high: float, wanted: int) -> list[float]:
    rough = (high - low) / max(wanted, 1)
    if not rough > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def span(values: Iterable[float | None], margin: float = 0.08) -> tuple[float, float]:
    """The lowest and the highest of the finite values with a margin around them; (0, 1) where there is none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return low - room, high + room


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick's number, with the decimals that the distance of ticks needs."""
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=abs(value) or 1.0)
    if abs(value) >= 1000 or step >= 1:
        return compact(round(value, 9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:.{min(digits, 9)}f}".replace("-", "−") if digits < 7 else compact(value)


def frame(x: Axis, y: Axis, x_title: str, y_title: str) -> Markup:
    """Ticks, light horizontal lines and titles; the title of y stands above its axis, where it is read without turning."""
    parts = [element("text", y_title, x=x.start, y=y.end - 10, class_="title")]
    ticks = y.ticks()
    for value in ticks:
        place, label = y.at(value), _log_label(value) if y.log else tick_label(value, ticks)
        parts.append(element("line", x1=x.start, x2=x.end, y1=place, y2=place, class_="grid"))
        parts.append(element("text", label, x=x.start - 5, y=place + 3.5, class_="tick end"))
    ticks = x.ticks()
    for value in ticks:
        place, label = x.at(value), _log_label(value) if x.log else tick_label(value, ticks)
        parts.append(element("line", x1=place, x2=place, y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(element("text", label, x=place, y=y.start + 15, class_="tick middle"))
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(element("text", x_title, x=x.end, y=y.start + 30, class_="title end"))
    return join(parts)


def _log_label(value: float) -> str:
    return f"{value:.4g}" if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")


def polyline(points: Sequence[Point], style: str) -> Markup:
    """A line through points in pixels."""
    return element("polyline", points=_points(points), class_=f"line {style}") if len(points) > 1 else Markup("")


def band(upper: Sequence[Point], lower: Sequence[Point], style: str) -> Markup:
    """The area between two lines over the same x."""
    if len(upper) < 2:
        return Markup("")
    return element("polygon", points=_points([*upper, *reversed(lower)]), class_=f"band {style}")


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def dot(x: float, y: float, style: str, tip: str = "", radius: float = 3.5) -> Markup:
    """A point, with words that appear where a pointer rests on it."""
    children = [element("title", tip)] if tip else []
    return element("circle", *children, cx=x, cy=y, r=radius, class_=f"dot {style}")


def upright_bar(x: float, y_low: float, y_high: float, style: str) -> Markup:
    """An error bar."""
    return element("line", x1=x, x2=x, y1=y_low, y2=y_high, class_=f"bar {style}")


def level_bar(y: float, x_low: float, x_high: float, style: str) -> Markup:
    """An error bar that lies."""
    return element("line", x1=x_low, x2=x_high, y1=y, y2=y, class_=f"bar {style}")


def labels(items: Sequence[tuple[float, str, str]], x: float, low: float, high: float) -> Markup:
    """Labels (y, text, style) beside the ends of lines, moved apart where they would lie on each other.

    Args:
        low, high: pixels between which they stay, low above high.
    """
    ordered = sorted(items)
    places: list[float] = []
    for wanted, _, _ in ordered:
        places.append(max(wanted, places[-1] + LINE) if places else max(wanted, low))
    over = places[-1] - high if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        if over > 0:
            limit = high if index == len(places) - 1 else places[index + 1] - LINE
            places[index] = min(places[index], limit)
    return join(
        element("text", text, x=x, y=place + 3.5, class_=f"label {style}")
        for place, (_, text, style) in zip(places, ordered, strict=True)
    )


def drawing(width: float, height: float, about: str, *parts: Markup) -> Markup:
    """The drawing; about: what a screen reader says of it."""
    return element("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=about, class_="chart")
