"""What was run? Dataset, rows, seeds and versions, and settings with their differences to the baseline's."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from pipeline.evaluation.report.blocks import Block, Facts, Section, Setting, Settings
from pipeline.evaluation.report.content import Model
from pipeline.evaluation.report.numbers import count, significant
from pipeline.overrides import dotted

VERSIONS = ("taskfuse", "torch", "torchrec", "polars")
ABSENT = "–"
LONGEST = 300  # characters of a value


def section(models: Sequence[Model], baseline: Model | None) -> Section:
    """The section: each model's facts and its settings beside the baseline's."""
    blocks: list[Block] = []
    for model in models:
        links = [("data card", f"of {model.dataset}", model.card)] if model.card else []
        blocks.append(Facts(_facts(model), links))
        if model is not baseline and model.config:
            theirs, name = _compared_with(model, baseline)
            blocks.append(compared(model.config, model.name, theirs, name))
    return Section("run", "What was run?", _lead(blocks), blocks)


def _compared_with(model: Model, baseline: Model | None) -> tuple[Mapping[str, Any] | None, str]:
    """The baseline's configuration, or else the model's own with the default training settings; and what it is called."""
    if baseline and baseline.config:
        return baseline.config, baseline.name
    if model.defaults is not None:
        return {**model.config, "train": model.defaults}, "the defaults of train"
    return None, ""


def _lead(blocks: Sequence[Block]) -> str:
    parts = [
        f"{count(len(block.differing))} of {count(len(block.differing) + len(block.same))} settings of {block.ours} differ "
        f"from {block.theirs}."
        for block in blocks
        if isinstance(block, Settings) and block.theirs
    ]
    return " ".join(parts) or "The checkpoint that this page judges, what it was evaluated on, and its settings."


def with_steps(found: Section, steps: Sequence[tuple[str, str]]) -> Section:
    """The section, with a night's steps before all else."""
    return replace(found, blocks=[Facts(steps), *found.blocks]) if steps else found


def _facts(model: Model) -> list[tuple[str, str]]:
    last = model.last
    train = model.config.get("train")
    seed = train.get("seed") if isinstance(train, Mapping) else None
    when = last.get("time")
    found = [
        ("run", model.name),
        ("dataset", f"{model.dataset}, split {model.split}"),
        ("checkpoint", f"step {count(last['step'])}, {last.get('checkpoint') or ''}" if last else ""),
        ("training rows", count(last["rows"]) if last else ""),
        ("evaluated rows", _evaluated(last)),
        ("intervals", _buckets(last)),
        ("AUC", _ranking(last.get("ranking"))),
        ("seed", "" if seed is None else str(seed)),
        ("evaluated", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when)) if isinstance(when, (int, float)) else ""),
        ("versions", ", ".join(versions())),
        *model.facts,
    ]
    return [(name, value) for name, value in found if value and value != ABSENT]


def _evaluated(record: Mapping[str, Any]) -> str:
    rows, seconds = record.get("rows_evaluated"), record.get("seconds")
    if rows is None:
        return ""
    share = record.get("share") or 1.0
    part = f", {significant(100 * share, 3)}% of the split" if share < 1 else ""
    ranks = record.get("ranks") or 1
    return (
        f"{count(rows)}{part}, {significant(seconds, 3)} s on {ranks} rank{'s' if ranks > 1 else ''}"
        if seconds
        else count(rows)
    )


def _buckets(record: Mapping[str, Any]) -> str:
    if not record.get("buckets"):
        return ""
    cluster, group = record.get("cluster") or "row", record.get("group")
    of_groups = "" if group in (None, cluster, "row") else f"; GAUC, NDCG: each {group} in one, by itself if of several"
    return f"95%, jackknife over {count(record['buckets'])} buckets of {cluster}{of_groups}"


def _ranking(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"sketch, error below {significant(next(iter(found.values()), None), 2)}"
    return "exact" if found == "exact" else ""


def versions() -> Iterator[str]:
    """Packages that are installed here, with their versions."""
    for name in VERSIONS:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def compared(ours: Mapping[str, Any], name: str, theirs: Mapping[str, Any] | None, their_name: str = "") -> Settings:
    """All settings of a configuration, those apart that another one has otherwise or not at all."""
    mine, other = _texts(ours), _texts(theirs or {})
    if theirs is None:
        return Settings([], [Setting(key, value) for key, value in mine.items()], name)
    keys = [*mine, *(key for key in other if key not in mine)]
    differing = [Setting(k, mine.get(k, ABSENT), other.get(k, ABSENT)) for k in keys if mine.get(k) != other.get(k)]
    same = [Setting(key, value) for key, value in mine.items() if other.get(key) == value]
    return Settings(differing, same, name, their_name)


def _texts(content: Mapping[str, Any]) -> dict[str, str]:
    """Settings by their dotted names, as text."""
    return {key: _shown(value) for key, value in dotted(content)}


def _shown(value: object) -> str:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
