"""A found network as a drawing: features at the bottom, the interaction, experts as columns of blocks, tasks on top."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from features.printable import printable
from models.automtl.architecture import Architecture
from pipeline.evaluation.report import svg
from pipeline.evaluation.report.numbers import significant

SKIP = "skip"
CHARACTERS = 18  # of a name in a box
PAGE = 1000.0  # pixels of a drawing that are seen at once, about
MARGIN, GAP, BLOCK, STEP = 10.0, 14.0, 24.0, 34.0  # pixels: around it, between columns, height of a block, of its slot
BAR, RISE, HEAD = (
    26.0,
    24.0,
    22.0,
)  # heights of interaction and features, of what is between layers, of an expert's name
COLOURS = ("#0b62a4", "#c65300", "#00795c", "#8a3b8f", "#8f6a00", "#b3261e", "#2a8c99", "#7a4a2a", "#c2408a", "#4747b3",
           "#5f7d1a", "#3d8fc4")  # fmt: skip
DASHES = (None, "7 3", "2 3")  # tasks beyond the colours have them again, with other lines
FILLS = {"mlp": ("#dce9f5", "#7fa9cf"), "conv": ("#fbe6d6", "#dd9a68"), "gating": ("#dcefe8", "#6fb39d")}
OTHER = ("#eeeaf4", "#a795c2")


@dataclass(frozen=True)
class Place:
    """A box: its left and upper edge and its width, in pixels."""

    left: float
    top: float
    width: float

    def port(self, index: int, number: int) -> float:
        """Where the line of an index of so many meets the upper or lower edge; all of them keep off the corners."""
        inside = min(self.width - 16, 12.0 * (number - 1))
        return self.left + self.width / 2 + inside * (index / (number - 1) - 0.5 if number > 1 else 0)


def drawing(
    found: Architecture, selection: Mapping[str, Mapping[int, float]], undecided: Sequence[tuple[int, int]] = ()
) -> Markup:
    """The drawing; each line from an expert to a task says both and the weight of the selection.

    Args:
        selection: of each task, the weights of experts by number; the strongest is drawn widest.
        undecided: numbers of experts and of blocks, which have a dashed edge.
    """
    used, depth = found.used, len(found.experts[0])
    column = max(_width(f"Expert {used[-1]}"), *(_width(name) for n in used for name in found.experts[n - 1])) + 12
    tag = max(_width(task) for task in found.tasks)
    inside = max(len(used) * (column + GAP), len(found.tasks) * (tag + GAP), 280.0)
    rise = min(90.0 + 4 * len(used) + 6 * len(found.tasks), 240.0)
    middle = MARGIN + BAR + rise
    tasks = dict(zip(found.tasks, _across(inside, len(found.tasks), tag, MARGIN), strict=True))
    experts = dict(zip(used, _across(inside, len(used), column, middle), strict=True))
    bottom = middle + HEAD + depth * STEP
    parts = [_lines(found, experts, tasks, selection)]
    parts += [_task(task, place, index) for index, (task, place) in enumerate(tasks.items())]
    parts += [
        _expert(number, found.experts[number - 1], place, {block for n, block in undecided if n == number})
        for number, place in experts.items()
    ]
    parts.append(_base(found.interaction, experts.values(), inside, bottom))
    size = (inside + 2 * MARGIN, bottom + 2 * (RISE + BAR) + MARGIN)
    about = f"found network: {found.interaction}, {len(used)} experts, {len(found.tasks)} tasks"
    box = f"0 0 {size[0]:g} {size[1]:g}"
    return svg.element("svg", *parts, viewBox=box, width=f"{size[0]:g}", role="img", aria_label=about, class_="network")


def _across(inside: float, number: int, width: float, top: float) -> list[Place]:
    """Boxes of a layer, evenly over the drawing."""
    pitch = inside / number
    return [Place(MARGIN + (index + 0.5) * pitch - width / 2, top, width) for index in range(number)]


def _lines(
    found: Architecture,
    experts: Mapping[int, Place],
    tasks: Mapping[str, Place],
    selection: Mapping[str, Mapping[int, float]],
) -> Markup:
    """From each expert to the tasks that use it; the wide ones lie below the narrow ones."""
    of = {number: [task for task, numbers in found.tasks.items() if number in numbers] for number in experts}
    largest = max(selection[task][number] for task, numbers in found.tasks.items() for number in numbers) or 1.0
    drawn = []
    for index, (task, numbers) in enumerate(found.tasks.items()):
        for place, number in enumerate(sorted(numbers)):
            weight = selection[task][number]
            x1, y1 = experts[number].port(of[number].index(task), len(of[number])), experts[number].top
            x2, y2 = tasks[task].port(place, len(numbers)), tasks[task].top + BAR
            bend = (y1 - y2) / 2
            path = f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 - bend:.1f} {x2:.1f},{y2 + bend:.1f} {x2:.1f},{y2:.1f}"
            title = svg.element("title", f"expert {number} → {task}: {significant(weight, 3)}")
            colour, dashes = _colour(index)
            line = svg.element(
                "path", title, d=path, stroke=colour, stroke_width=0.8 + 4.2 * weight / largest,
                stroke_dasharray=dashes, class_="link",
            )  # fmt: skip
            drawn.append((-weight, index, number, line))
    return svg.join(line for *_, line in sorted(drawn, key=lambda item: item[:3]))


def _task(task: str, place: Place, index: int) -> Markup:
    colour, dashes = _colour(index)
    box = svg.element(
        "rect", svg.element("title", task), x=place.left, y=place.top, width=place.width, height=BAR, rx=13, fill=colour,
        stroke="#fff" if dashes else colour, stroke_dasharray=dashes,
    )  # fmt: skip
    return svg.join([box, _text(task, place.left + place.width / 2, place.top + BAR / 2, "label light")])


def _expert(number: int, names: Sequence[str], place: Place, undecided: set[int]) -> Markup:
    """A column: the name on top, the first block at the bottom, a skip as a ring on the line that goes through."""
    height, x = HEAD + len(names) * STEP, place.left + place.width / 2
    parts = [
        svg.element("rect", x=place.left, y=place.top, width=place.width, height=height, rx=6, class_="frame"),
        svg.element("line", x1=x, x2=x, y1=place.top + HEAD, y2=place.top + height, class_="wire"),
        _text(f"Expert {number}", x, place.top + HEAD / 2 + 2, "label"),
    ]
    for level, name in enumerate(names, 1):
        y = place.top + HEAD + (len(names) - level) * STEP + STEP / 2
        title = svg.element("title", f"expert {number}, block {level}: {name}{', undecided' * (level in undecided)}")
        even = " even" if level in undecided else ""
        if name == SKIP:
            parts.append(svg.element("circle", title, cx=x, cy=y, r=4, class_=f"skip{even}"))
            continue
        fill, edge = FILLS.get(name.split("_")[0], OTHER)
        box = {"x": place.left + 6, "y": y - BLOCK / 2, "width": place.width - 12, "height": BLOCK, "rx": 4}
        parts.append(svg.element("rect", title, **box, fill=fill, stroke=edge, stroke_width=1.2, class_=f"block{even}"))
        parts.append(_text(name, x, y, "dark"))
    return svg.join(parts)


def _base(interaction: str, experts: Iterable[Place], inside: float, top: float) -> Markup:
    """The interaction and the features, as wide as the layer of experts, each expert with a line from the interaction."""
    x, over, under = MARGIN + inside / 2, top + RISE, top + 2 * RISE + BAR
    parts = []
    for place in experts:
        middle = place.left + place.width / 2
        parts.append(svg.element("line", x1=middle, x2=middle, y1=over, y2=top, class_="wire"))
    parts.append(svg.element("line", x1=x, x2=x, y1=under, y2=over + BAR, class_="wire"))
    title = svg.element("title", f"interaction: {interaction}")
    size = {"x": MARGIN, "width": inside, "height": BAR, "rx": 4}
    parts.append(svg.element("rect", title, y=over, **size, class_="bar-of"))
    parts.append(svg.element("rect", y=under, **size, class_="frame"))
    # A drawing that is wider than a page says it again, so that it is read wherever one has scrolled to.
    times = max(1, round(inside / PAGE))
    for place in _across(inside, times, 0, 0):
        parts.append(_text(f"interaction: {interaction}", place.left, over + BAR / 2, "label", limit=40))
        parts.append(_text("features", place.left, under + BAR / 2, "label"))
    return svg.join(parts)


def _text(shown: str, x: float, y: float, style: str, limit: int = CHARACTERS) -> Markup:
    return svg.element("text", short(shown, limit), x=x, y=y + 4, class_=f"middle {style}")


def short(name: str, limit: int = CHARACTERS) -> str:
    """A name shortened in its middle: names of a family differ at their ends."""
    text = printable(name)
    if len(text) <= limit:
        return text
    return f"{text[: limit - 8]}…{text[-7:]}"


def _width(name: str) -> float:
    """Of a box around a name, in pixels; capitals and East Asian characters are wider."""
    characters = short(name)
    wide = 4.0 * sum(unicodedata.east_asian_width(character) in "WF" for character in characters)
    wide += sum(
        4.0 if character in "MW@%" else 1.8 for character in characters if character.isupper() or character in "mw@%&"
    )
    return 18 + 7.5 * len(characters) + wide


def _colour(index: int) -> tuple[str, str | None]:
    """Of a task's lines, and their dashes."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
