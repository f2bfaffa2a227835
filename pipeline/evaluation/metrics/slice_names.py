"""Names of slices: which ones a pattern or a dimension covers, and which an evaluation may have."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from pipeline.evaluation.metrics.evaluated import ALL

COLD_START = " (cold start)"  # ends the name of a dimension of known and unknown ids
EVERY = "*"  # every slice of every dimension but ALL


def covers(patterns: Iterable[str], dimension: str, name: str) -> bool:
    """Whether a slice is one of a pattern (`device=*`) or of a dimension (`device`)."""
    return dimension != ALL and any(
        pattern == dimension or fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))
        for pattern in patterns
    )


def can_occur(name: str, dimensions: Iterable[str]) -> bool:
    """Whether an evaluation with these dimensions may have a slice of this name; * stands for any part of a value."""
    return name == ALL or any(re.fullmatch(_form(dimension), name) for dimension in dimensions)


def can_cover(pattern: str, dimensions: Iterable[str]) -> bool:
    """Whether a pattern, or a dimension, may cover a slice of an evaluation with these dimensions."""
    known = [dimension for dimension in dimensions if dimension != ALL]
    return pattern in known or (pattern == EVERY and bool(known)) or (pattern != ALL and can_occur(pattern, known))


def _form(dimension: str) -> str:
    """The regular expression of the names of a dimension's slices; those of a cross are joined as its columns are."""
    return ", ".join(_form_of_part(part) for part in dimension.split(", "))


def _form_of_part(part: str) -> str:
    """Slices are `column=value`, between edges `column 18..25`, of ids `column: unseen`; a condition in SQL is its own."""
    column = part.removesuffix(COLD_START)
    if column != part:
        return rf"{re.escape(column)}: (?:unseen|rare|missing|\*)"
    value = r'=(?:"(?:[^"\\]|\\.)*"|(?:(?!, [\w.]+=).)+)'  # in quotes it may hold anything
    of_edges = r" (?:below \S+|\S+\.\.\S+|from \S+|missing|\*)"
    is_condition = not re.fullmatch(r"[\w.]+", part)
    return rf"{re.escape(part)}(?:{value}|{of_edges}){'?' if is_condition else ''}"
