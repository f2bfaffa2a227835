"""What is inside? Mean gate weights by level as heat maps, with units and experts by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.evaluation.report import svg
from pipeline.evaluation.report.blocks import Block, Drawing, Drawings, Note, Section
from pipeline.evaluation.report.content import Model
from pipeline.evaluation.report.numbers import count, significant

# Colours of weights, light to dark blue, and of negative ones, light to dark orange; lightness falls evenly.
POSITIVE = ("#f3f7fb", "#d3e4f2", "#a9cbe6", "#79aed6", "#4b8fc2", "#266fa8", "#0e5088", "#053561")
NEGATIVE = ("#fbf3ee", "#f6dccb", "#eebb9a", "#e2956a", "#cf6c3a", "#a94a1c")
PRINTED = 260  # numbers in the cells of a heat map; in one of more they would not be legible


def section(models: Sequence[Model]) -> Section:
    """The section; a level of one model is one heat map."""
    blocks: list[Block] = []
    for model in models:
        gates = model.last.get("gates") or []
        names = model.last.get("gate_names") or []
        drawings = [
            Drawing(_title(level, len(gates)), heat_map(mean_UE, *_named(names, level, mean_UE, model)))
            for level, mean_UE in enumerate(gates)
            if mean_UE and mean_UE[0]
        ]
        if drawings:
            blocks.append(Drawings(drawings, model.name if len(models) > 1 else ""))
    about = (
        "Mean weights over the rows of the split: each line mixes the columns. An expert has the name of the task that owns it."
        if blocks
        else "The model has no gates."
    )
    return Section("inside", "What is inside?", _lead(models), [*blocks, Note(about)])


def _title(level: int, levels: int) -> str:
    return f"Level {level + 1} of {levels}" if levels > 1 else "Gates"


def _lead(models: Sequence[Model]) -> str:
    parts = []
    for model in models:
        fusion = (model.config.get("model") or {}).get("fusion") or {}
        name = fusion.get("name") if isinstance(fusion, Mapping) else None
        parts += [f"{model.name}: fusion {name}." if len(models) > 1 else f"Fusion {name}."] if name else []
    return " ".join(parts)


def _named(names: Any, level: int, mean_UE: Sequence[Sequence[float]], model: Model) -> tuple[list[str], list[str]]:
    """Names of units and experts: those of the record, or, in one of an early version, tasks and numbers."""
    units, experts = len(mean_UE), len(mean_UE[0])
    if level < len(names) and (len(names[level]["units"]), len(names[level]["experts"])) == (units, experts):
        return names[level]["units"], names[level]["experts"]
    of_tasks = [*model.kinds, "shared"][:units] if 0 <= units - len(model.kinds) <= 1 else []
    return of_tasks or [str(unit + 1) for unit in range(units)], [str(expert + 1) for expert in range(experts)]


def heat_map(mean_UE: Sequence[Sequence[float]], units: Sequence[str], experts: Sequence[str]) -> Markup:
    """Weights as shades with their numbers, units down, experts across; names of experts stand upright where they are long."""
    flat = [x for row in mean_UE for x in row]
    top, bottom = max(max(flat), 1e-12), min(min(flat), 0.0)
    scale = max(top, -bottom)
    left = 12 + 6.2 * min(16, max(len(name) for name in units))
    width, height = (354 - left) / len(experts), 26.0 if len(units) <= 16 else 14.0
    turned = max(len(name) for name in experts) * 6.2 > width - 4
    head = 14 + (5.9 * min(16, max(len(name) for name in experts)) if turned else 6)
    parts = [_column_name(name, left + (e + 0.5) * width, head, turned) for e, name in enumerate(experts)]
    printed = len(flat) <= PRINTED and width >= 19
    for u, (unit, row) in enumerate(zip(units, mean_UE, strict=True)):
        y = head + u * height
        parts.append(
            svg.element(
                "text", svg.element("title", unit), _short(unit), x=left - 6, y=y + height / 2 + 4, class_="end"
            )
        )
        for e, weight in enumerate(row):
            x, shade = left + e * width, _shade(weight, scale)
            tip = svg.element("title", f"{unit} ← {experts[e]}: {significant(weight, 3)}")
            parts.append(svg.element("rect", tip, x=x, y=y, width=width, height=height, fill=shade[0], class_="cell"))
            if printed:
                style = f"middle {shade[1]}"
                parts.append(
                    svg.element(
                        "text", f"{weight:.2f}".replace("-", "−"), x=x + width / 2, y=y + height / 2 + 4, class_=style
                    )
                )
    size = f"{count(len(units))} units by {count(len(experts))} experts"
    return svg.drawing(360, head + len(units) * height + 6, f"mean gate weights, {size}", *parts)


def _column_name(name: str, x: float, y: float, turned: bool) -> Markup:
    tip = svg.element("title", name)
    if not turned:
        return svg.element("text", tip, _short(name), x=x, y=y - 7, class_="middle")
    return svg.element(
        "text", tip, _short(name), x=x + 3.5, y=y - 6, transform=f"rotate(-90 {x + 3.5:.1f} {y - 6:.1f})"
    )


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _shade(weight: float, scale: float) -> tuple[str, str]:
    """The colour of a weight, and whether text on it is dark or light."""
    shades = POSITIVE if weight >= 0 else NEGATIVE
    index = min(int(abs(weight) / scale * len(POSITIVE)), len(shades) - 1)
    return shades[index], "light" if index >= 4 else "dark"
