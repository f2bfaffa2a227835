"""What is inside? Mean gate weights by level as heat maps, with units and experts by name, and what the model rests on."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.evaluation.report import explained
from pipeline.evaluation.report.blocks import Block, Drawing, Drawings, Note, Section
from pipeline.evaluation.report.content import Model
from pipeline.evaluation.report.heat_map import heat_map
from pipeline.evaluation.report.numbers import significant


def section(models: Sequence[Model]) -> Section:
    """The section; a level of one model is one heat map."""
    blocks: list[Block] = []
    for model in models:
        gates = model.last.get("gates") or []
        names = model.last.get("gate_names") or []
        drawings = [
            Drawing(_title(level, len(gates)), gate_map(mean_UE, *_named(names, level, mean_UE, model)))
            for level, mean_UE in enumerate(gates)
            if mean_UE and mean_UE[0]
        ]
        if drawings:
            blocks.append(Drawings(drawings, model.name if len(models) > 1 else ""))
    about = (
        "Mean weights over the rows of the split: each line mixes the columns. An expert that a task owns has the task's name."
        if blocks
        else "The model has no gates."
    )
    blocks.append(Note(about))
    for model in models:
        blocks += explained.blocks(model, model.name if len(models) > 1 else "")
    return Section("inside", "What is inside?", _lead(models), blocks)


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


def gate_map(mean_UE: Sequence[Sequence[float]], units: Sequence[str], experts: Sequence[str]) -> Markup:
    """Mean gate weights, units down, experts across."""
    return heat_map(
        mean_UE, units, experts, "mean gate weights",
        shown=lambda weight: f"{weight:.2f}".replace("-", "−"),
        tip=lambda u, e: f"{units[u]} ← {experts[e]}: {significant(mean_UE[u][e], 3)}",
    )  # fmt: skip
