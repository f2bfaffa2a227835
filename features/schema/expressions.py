"""SQL expressions over the columns of one row: what may be written in a schema."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import polars as pl

_QUOTED = r"""'[^']*'|"[^"]*"|`[^`]*`|(?<![\w$])(?P<tag>\$\w*\$).*?(?P=tag)"""
_TOKEN = re.compile(rf"(?P<comment>--|/\*)|{_QUOTED}", re.DOTALL)
_ESCAPES = re.compile(r"""[\\$]|--|/\*""")  # where quotes may end elsewhere than _QUOTED thinks
_QUERY = re.compile(r"\b(select|from)\b", re.IGNORECASE)
_MOMENT = re.compile(r"\b(?:date|datetime|time|timestamp)\s*$", re.IGNORECASE)
_MOMENTS = {"Date", "Datetime", "Time"}  # types of literals, in a tree

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


def columns_of(expression: str) -> list[str]:
    """Columns that a SQL expression reads.

    Raises:
        ValueError: it cannot be parsed, holds a query of its own, which could reach files (and would, by being parsed), or
            its value may depend on more than its row: on other rows, and so on where a block of rows ends, or on the clock.
    """
    return list(_columns_of(expression))


@lru_cache(maxsize=1024)
def _columns_of(expression: str) -> tuple[str, ...]:
    bare = _TOKEN.sub(lambda token: token["comment"] or "''", expression)
    if _QUERY.search(expression if _ESCAPES.search(expression) else bare):
        raise ValueError(f"{expression!r} holds a query: an expression may only read columns of its row")
    if comment := next((t["comment"] for t in _TOKEN.finditer(expression) if t["comment"]), None):
        raise ValueError(f"{expression!r} holds a comment ({comment}): remove it, and write - - for two minus signs")
    try:
        meta = pl.sql_expr(expression).meta
        tree, written = _tree(expression), _moments(expression)
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise ValueError(f"{expression!r} is not a SQL expression: {error}") from None
    if meta.has_multiple_outputs():
        raise ValueError(f"{expression!r} stands for several columns: name the one that is meant")
    if beyond := dict.fromkeys(_not_allowed(tree, written)):
        raise ValueError(
            f"{expression!r} uses {', '.join(beyond)}: an expression may only use columns of its row and functions of them"
        )
    return tuple(meta.root_names())


def _tree(expression: str) -> Any:
    return json.loads(pl.sql_expr(expression).meta.serialize(format="json"))


def _moments(expression: str) -> list[Any]:
    """The literals that an expression spells out, such as DATE '2020-01-01'. A call of the clock becomes one, too."""
    found = [(_MOMENT.search(expression[: token.start()]), token[0]) for token in _TOKEN.finditer(expression)]
    return [_tree(kind[0] + text)["Literal"] for kind, text in found if kind]


def _not_allowed(node: Any, written: list[Any]) -> Iterator[str]:
    """Names of the parts of an expression tree that do not depend on their row alone.

    Args:
        written: literals of dates and times that the expression spells out.
    """
    if not isinstance(node, dict):
        yield _WORDS.get(str(node), str(node))
        return
    ((kind, content),) = node.items()
    if kind == "Column":
        return
    if kind == "Literal":
        if _MOMENTS & content.get("Scalar", {}).keys() and content not in written:
            yield "the clock"
    elif kind == "BinaryExpr":
        yield from _not_allowed(content["left"], written)
        yield from _not_allowed(content["right"], written)
    elif kind == "Ternary":
        for part in content.values():
            yield from _not_allowed(part, written)
    elif kind == "Cast":
        yield from _not_allowed(content["expr"], written)
    elif kind == "Function":
        if (name := _name(content["function"])) not in ALLOWED:
            yield name
        elif name == "StringExpr.Strptime" and content["function"]["StringExpr"]["Strptime"][1]["format"] is None:
            yield "a date without a format, which is guessed from other rows"
        for part in content["input"]:
            yield from _not_allowed(part, written)
    elif kind == "Agg":
        yield f"{next(iter(content)).upper()} over rows"
    else:
        yield _WORDS.get(kind, str(kind))


def _name(function: Any) -> str:
    """FUNCTION, or FAMILY.FUNCTION, without its settings."""
    if isinstance(function, str):
        return function
    ((family, content),) = function.items()
    member = content if isinstance(content, str) else next(iter(content), "") if isinstance(content, dict) else ""
    return family if family in ALLOWED else f"{family}.{member}"
