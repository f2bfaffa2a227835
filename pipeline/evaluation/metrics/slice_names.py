"""Names of slices: which ones a pattern or a dimension covers, and which an evaluation may have."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from pipeline.evaluation.metrics.evaluated import ALL

COLD_START = " (cold start)"  # ends the name of a dimension of known and unknown ids
EVERY = "*"  # every slice of every dimension but ALL

# Dimension → names of the slices that it may have; None: `column=value` of any value, of a cross one for each column.
Dimensions = Mapping[str, Sequence[str] | None]

_PART = re.compile(
    r'(?:^|, )([\w.*]+="(?:[^"\\]|\\.)*"|(?:(?!, ).)*)(?=, |\Z)', re.DOTALL
)  # a value in quotes may hold ", "


def covers(patterns: Iterable[str], dimension: str, name: str) -> bool:
    """Whether a slice is one of a dimension (`device`) or of a pattern (`device=*`), of a cross with one for each part."""
    return dimension != ALL and any(pattern in (dimension, EVERY) or _matches(pattern, name) for pattern in patterns)


def can_occur(name: str, dimensions: Dimensions) -> bool:
    """Whether an evaluation with these dimensions may have a slice of this name."""
    return name == ALL or any(
        name in names if names is not None else "*" not in name and _fits(name, dimension)
        for dimension, names in dimensions.items()
    )


def can_cover(pattern: str, dimensions: Dimensions) -> bool:
    """Whether a pattern, or a dimension, may cover a slice of an evaluation with these dimensions."""
    return any(
        pattern in (dimension, EVERY)
        or (_fits(pattern, dimension) if names is None else any(_matches(pattern, name) for name in names))
        for dimension, names in dimensions.items()
    )


def _matches(pattern: str, name: str) -> bool:
    wanted, parts = _PART.findall(pattern), _PART.findall(name)
    return len(wanted) == len(parts) and all(
        fnmatchcase(part, of_part.replace("[", "[[]").replace("?", "[?]"))
        for of_part, part in zip(wanted, parts, strict=True)
    )


def _fits(pattern: str, dimension: str) -> bool:
    """Whether a pattern may be of `column=value`, or of one for each column of a cross."""
    parts, columns = _PART.findall(pattern), _PART.findall(dimension)
    return len(parts) == len(columns) and all(map(_fits_part, parts, columns))


def _fits_part(pattern: str, column: str) -> bool:
    head, star, _ = pattern.partition("*")
    prefix = f"{column}="
    return (head.startswith(prefix) and pattern != prefix) or (star != "" and prefix.startswith(head))
