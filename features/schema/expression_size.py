"""How much memory an expression can need, from its tree alone: bounded before a row is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from features.schema.expression_tree import name_of, settings_of

MAX_TIMES = 1000  # bytes for each byte that a row has in a column
MAX_FIXED = 1 << 20  # bytes a row beside them
SCALAR = 40  # bytes: more than a number or time needs, also as text
ENTRY = 16  # bytes: what a text or list needs beside its characters
CASES = 3  # most bytes that another case of a letter has, for each of its own
FORMS = 11  # the same of a Unicode normal form
DIRECTIVE = 20  # most characters of a date for each of its format (%c)

# Functions of numbers, truth values or times as results: SCALAR, whatever they read.
_SCALARS = {
    *("StringExpr.Contains", "StringExpr.EndsWith", "StringExpr.StartsWith", "StringExpr.Find"),
    *("StringExpr.LenBytes", "StringExpr.LenChars", "StringExpr.Strptime"),
    *("ListExpr.Contains", "ListExpr.Length", "ListExpr.Mean", "ListExpr.Sum", "Sql.IsIn"),
}
_COMPARISONS = {"Eq", "NotEq", "Lt", "LtEq", "Gt", "GtEq", "EqValidity", "NotEqValidity", "And", "Or", "Xor"}


@dataclass(frozen=True)
class Size:
    """At most `times[column]` bytes for each byte that a row has in a column, and `fixed` bytes beside them."""

    times: dict[str, int]
    fixed: int

    def __add__(self, other: Size) -> Size:
        return self._with(other, lambda a, b: a + b)

    def __or__(self, other: Size) -> Size:
        """Enough for either."""
        return self._with(other, max)

    def __mul__(self, factor: int) -> Size:
        return Size({column: factor * times for column, times in self.times.items()}, factor * self.fixed)

    def _with(self, other: Size, of: Callable[[int, int], int]) -> Size:
        columns = self.times.keys() | other.times.keys()
        times = {column: of(self.times.get(column, 0), other.times.get(column, 0)) for column in columns}
        return Size(times, of(self.fixed, other.fixed))


def size_of(tree: Any) -> Size:
    """What all values need that are computed for a row, those on the way to the result among them.

    Args:
        tree: of allowed parts alone.

    Raises:
        ValueError: saying what is unbounded, or larger than MAX_TIMES or MAX_FIXED.
    """
    made: list[Size] = []
    _value(tree, made)
    size = sum(made, Size({}, 0))
    if (times := max(size.times.values(), default=0)) > MAX_TIMES:
        raise ValueError(f"may need {times:,} times the bytes of a column: allowed are {MAX_TIMES:,} times")
    if size.fixed > MAX_FIXED:
        raise ValueError(f"may need {size.fixed:,} bytes of each row: allowed are {MAX_FIXED:,}")
    return size


def _value(node: Any, made: list[Size]) -> Size:
    """What the value of a node needs; that of all nodes but columns is added to `made`."""
    ((kind, content),) = node.items()
    if kind == "Column":
        return Size({content: 1}, SCALAR)
    if kind == "Literal":
        size = Size({}, max(SCALAR, len(_text(node) or "") * 4, len(content.get("Series", ()))))
    elif kind == "BinaryExpr":
        left, right = (_value(content[side], made) for side in ("left", "right"))
        size = (left + right) if content["op"] == "Plus" else (left | right)
        size = Size({}, SCALAR) if content["op"] in _COMPARISONS else size
    elif kind == "Ternary":
        _value(content["predicate"], made)
        size = _value(content["truthy"], made) | _value(content["falsy"], made)
    elif kind == "Cast":
        size = _value(content["expr"], made)
        size = size * (1 + ENTRY) if "List" in content["dtype"]["Literal"] else size
    else:
        size = _function(content, [_value(part, made) for part in content["input"]])
        if name_of(content["function"]) == "StringExpr.Split":
            made.append(size * ENTRY)  # a list can have an item for each character
    made.append(size + Size({}, ENTRY))
    return size


def _function(content: Any, args: list[Size]) -> Size:
    """What the result of a function of values needs."""
    name, settings = name_of(content["function"]), settings_of(content["function"])
    texts = [_text(part) for part in content["input"]]
    if name == "TemporalExpr.ToString":
        return Size({}, SCALAR + DIRECTIVE * len(content["function"]["TemporalExpr"]["ToString"]))
    if name in ("StringExpr.Contains", "StringExpr.Find") and not settings["literal"] and texts[1] is None:
        raise ValueError("has a regular expression that is computed: write it out")
    if name in _SCALARS or name.startswith(("Boolean.", "TemporalExpr.")):
        return Size({}, SCALAR)
    if name in ("StringExpr.PadStart", "StringExpr.PadEnd"):
        return args[0] + Size({}, 4 * _length(content["input"][1]))
    if name == "StringExpr.Replace":
        return _replaced(args[0], texts[1], texts[2], settings)
    if name == "StringExpr.ConcatHorizontal":
        return sum(args, Size({}, len(args) * 4 * len(settings["delimiter"])))
    if name == "ListExpr.Join":
        if texts[1] is None:
            raise ValueError("joins a list with a text that is computed: write it out")
        return args[0] * (1 + 4 * len(texts[1]))
    if name in ("StringExpr.Uppercase", "StringExpr.Lowercase", "StringExpr.Titlecase"):
        return args[0] * CASES
    if name == "StringExpr.Normalize":
        return args[0] * FORMS
    if name.startswith("StringExpr."):
        return args[0]  # a part of it, or its order turned round
    size = Size({}, SCALAR)
    for arg in args:
        size = size | arg
    return size


def _replaced(text: Size, pattern: str | None, value: str | None, settings: Any) -> Size:
    """What a text needs once each match of a pattern, or the first, is replaced by a value."""
    if pattern is None or value is None:
        raise ValueError("replaces by a text that is computed: write it out")
    old, new = len(pattern.encode()), len(value.encode())
    if settings["literal"] and old:
        return text * max(1, -(-new // old))
    groups = value.count("$")  # each may repeat all that matched
    if settings["n"] == 1:
        return text * (1 + groups) + Size({}, new)
    return text * (1 + groups + new) + Size({}, new)


def _text(node: Any) -> str | None:
    """A literal text; None for another node."""
    literal = node.get("Literal", {}) if isinstance(node, dict) else {}
    return literal.get("Scalar", {}).get("String")


def _length(node: Any) -> int:
    """A literal whole number. Raises ValueError for another node."""
    literal = node.get("Literal", {}) if isinstance(node, dict) else {}
    found = next(iter((literal.get("Dyn") or literal.get("Scalar") or {}).values()), None)
    if not isinstance(found, int):
        raise ValueError("pads to a length that is computed: write it out")
    return max(found, 0)
