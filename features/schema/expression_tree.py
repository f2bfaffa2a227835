"""The tree of a SQL expression, as polars serializes it: which parts it may have, so that a row's value is its row's alone."""

from collections.abc import Iterator
from typing import Any

_MOMENTS = {"Date", "Datetime", "Time"}  # types of literals
_NUMBERS = {f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64, 128)} | {"Float32", "Float64"}
_SCALARS = _NUMBERS | _MOMENTS | {"Boolean", "Decimal", "Duration", "String"}
LITERALS = _SCALARS | {"Null"}
MAX_DEPTH = 150  # levels; from some 800 on, polars' recursion can overflow a thread's stack

# Functions whose value depends on their row alone, as polars' expression tree names them: FAMILY.FUNCTION, or FUNCTION.
# SQL knows some by other names (GREATEST is MaxHorizontal), and its * / // % are Sql.Binary.
_FAMILIES = {
    "": "Abs Atan2 Ceil Clip Coalesce Exp FillNull Floor Log Log1p MaxHorizontal MinHorizontal Sign Truncate",
    "Bitwise.": "CountOnes",
    "Boolean.": "IsNotNull IsNull Not",
    "ListExpr.": "Contains Get Join Length Max Mean Min Sum",
    "Pow.": "Cbrt Generic Sqrt",
    "Sql.": "Binary IsIn Round ToFloat",
    "StringExpr.": "ConcatHorizontal Contains EndsWith Find LenBytes LenChars Lowercase Normalize PadEnd PadStart Replace "
    "Reverse Slice Split StartsWith StripChars StripCharsEnd StripCharsStart Strptime Titlecase Uppercase",
    "StructExpr.": "FieldByName",
    "TemporalExpr.": "BaseUtcOffset Century Day Hour IsoYear Millennium Minute Month Nanosecond OffsetBy OrdinalDay Quarter "
    "Second Time TimeStamp ToString TotalSeconds Week WeekDay Year",
    "Trigonometry.": "ArcCos ArcSin ArcTan Cos Cot Degrees Radians Sin Tan",
}
ALLOWED = {family + name for family, names in _FAMILIES.items() for name in names.split()}
# Names of other parts of a tree, for a message.
_WORDS = {"Over": "OVER", "Len": "COUNT(*)", "Explode": "UNNEST", "SubPlan": "a query", "Filter": "FILTER"}


def not_allowed(node: Any, written: list[Any], depth: int = 0) -> Iterator[str]:
    """Names of the parts of an expression tree that are not allowed: they may depend on more than their row.

    Args:
        written: literals of dates and times that the expression spells out.
        depth: levels above the node.

    Raises:
        RecursionError: the tree has more than MAX_DEPTH levels.
    """
    if depth > MAX_DEPTH:
        raise RecursionError
    if not isinstance(node, dict):
        yield _WORDS.get(str(node), str(node))
        return
    ((kind, content),) = node.items()
    below: list[Any] = []
    if kind == "Literal":
        yield from _literal(content, written)
    elif kind == "BinaryExpr":
        below = [content["left"], content["right"]]
    elif kind == "Ternary":
        below = list(content.values())
    elif kind == "Cast":
        if not _is_type(content["dtype"]):
            yield _type_name(content["dtype"])
        below = [content["expr"]]
    elif kind == "Function":
        if (name := name_of(content["function"])) not in ALLOWED:
            yield name
        elif name == "StringExpr.Strptime":
            to, settings = content["function"]["StringExpr"]["Strptime"]
            if settings["format"] is None:
                yield "a date without a format, which is guessed from other rows"
            if not _is_type(to):
                yield _type_name(to)
        below = content["input"]
    elif kind == "Agg":
        yield f"{next(iter(content)).upper()} over rows"
    elif kind != "Column":
        yield _WORDS.get(kind, str(kind))
    for part in below:
        yield from not_allowed(part, written, depth + 1)


def name_of(function: Any) -> str:
    """FUNCTION, or FAMILY.FUNCTION, without its settings."""
    if isinstance(function, str):
        return function
    ((family, content),) = function.items()
    member = content if isinstance(content, str) else next(iter(content), "") if isinstance(content, dict) else ""
    return family if family in ALLOWED else f"{family}.{member}"


def settings_of(function: Any) -> Any:
    """The settings of FAMILY.FUNCTION, such as the format of a date; empty where it has none."""
    while isinstance(function, dict) and len(function) == 1 and next(iter(function))[0].isupper():
        ((_, function),) = function.items()
    return function if isinstance(function, dict) else {}


def _literal(content: Any, written: list[Any]) -> Iterator[str]:
    """What is not allowed of a literal: a value of the clock, or a type that columns do not have."""
    if content.keys() <= {"Dyn", "Series"}:  # a number, or the list of IN
        return
    types = content.get("Scalar", {}).keys()
    if not types or types - LITERALS:
        yield f"a literal of type {', '.join(types or content)}"
    elif types & _MOMENTS and content not in written:
        yield "the clock"


def _type_name(dtype: Any) -> str:
    kind = dtype.get("Literal", dtype) if isinstance(dtype, dict) else dtype
    return f"a cast to {next(iter(kind)) if isinstance(kind, dict) and len(kind) == 1 else kind}"


def _is_type(dtype: Any) -> bool:
    """Whether it is the type of a number, text, date or time, or of a list of them: {"Literal": "Int64"}, {"List": …}."""
    if not isinstance(dtype, dict) or dtype.keys() != {"Literal"}:
        return False
    kind = dtype["Literal"]
    if isinstance(kind, dict) and kind.keys() == {"List"}:
        kind = kind["List"]
    return (next(iter(kind), None) if isinstance(kind, dict) and len(kind) == 1 else kind) in _SCALARS
