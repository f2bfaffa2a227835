"""Comparisons of text with numbers: polars would compare the number's digits as text, and '10' is below '9.4'."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import polars as pl

from features.schema.expression_tree import name_of
from features.schema.expressions import FAULTS, columns_of, shown, sql_name, tree_of
from features.source import RawType, outcome_names

if TYPE_CHECKING:
    from features.schema.schema import Schema

_COMPARISONS = {"Eq", "NotEq", "Lt", "LtEq", "Gt", "GtEq", "EqValidity", "NotEqValidity", "EqMissing", "NotEqMissing"}
_OF_RAW: dict[RawType, type[pl.DataType]] = {
    "int": pl.Int64,
    "float": pl.Float64,
    "time": pl.Int64,
    "string": pl.String,
}


@dataclass(frozen=True)
class _Mixed:
    """A comparison of text with another kind of value.

    Attributes:
        kind: of the other side, "number" or "truth value".
        text: the columns that its side reads, only those of text where there are any.
        other: the columns of the other side.
    """

    kind: str
    text: tuple[str, ...]
    other: tuple[str, ...]


def mixed_comparison(
    expression: str, types: Mapping[str, pl.DataType], declared: Mapping[str, str] | None = None
) -> str | None:
    """What is wrong with the first comparison of text with a number or truth value, and what to write; None without one.

    Args:
        expression: a valid one.
        types: of its columns. What is made of columns that are left out may be of any type.
        declared: the keys that columns have their types from; by default `source.types`.
    """
    found = _mixed(expression, tuple(types.items()))
    if found is None:
        return None
    number = found.kind == "number"
    if not found.text:
        cure = "remove the quotes" if number else "write TRUE or FALSE without quotes"
    elif number:
        column = found.text[0]
        key = (declared or {}).get(column, f"source.types.{column}") if types.get(column) == pl.String else ""
        cure = f"write TRY_CAST({sql_name(column)} AS DOUBLE), which is null where it is no number"
        cure += f", or set {key} to float or int" if key else ""
    else:
        cure = "compare it with text, such as 'true'"
    text, other = (f" ({', '.join(columns[:3])})" if columns else "" for columns in (found.text, found.other))
    return f"{shown(expression)} compares text{text} with a {found.kind}{other}: {cure}"


@lru_cache(maxsize=1024)
def _mixed(expression: str, types: tuple[tuple[str, pl.DataType], ...]) -> _Mixed | None:
    rows = pl.LazyFrame(schema=dict(types))
    for sides in _compared(tree_of(expression)):
        left, right = (_kind(side, rows) for side in sides)
        if left != right and "text" in (left, right) and (kind := right if left == "text" else left):
            text, other = sides if left == "text" else sides[::-1]
            columns = _columns(text)
            texts = tuple(column for column in columns if dict(types).get(column) == pl.String)
            return _Mixed(kind, texts or columns, _columns(other))
    return None


def mixed_comparisons(schema: Schema) -> Iterator[str]:
    """The comparisons of text with numbers that a schema shows before a row is read."""
    types, declared = column_types(schema), _declared(schema)
    for key, expression in schema.expressions.items():
        if found := mixed_comparison(expression, {c: types[c] for c in columns_of(expression) if c in types}, declared):
            yield f"{key}: {found}"


def column_types(schema: Schema) -> dict[str, pl.DataType]:
    """Types of the columns that expressions read or `keep` names, without raw ones that may hold lists."""
    source = schema.source
    lists = {raw.column for raw in schema.raw.values() if raw.separator}
    found: dict[str, pl.DataType] = {column: pl.String() for column in schema.raw_columns if column not in lists}
    found |= {column: _OF_RAW[kind]() for column, kind in schema.raw_types.items()}
    for name, outcome in source.outcomes.items():
        found |= dict.fromkeys(outcome_names(name, outcome), pl.Int64()) | {name: pl.Boolean()}
        found |= {f"{name}_{column}": _OF_RAW[kind]() for column, kind in outcome.columns.items()}
    for name, table in source.tables.items():
        found |= {f"{name}_{column}": _OF_RAW[kind]() for column, kind in table.columns.items()}
    found |= dict.fromkeys(source.counters, pl.Float64())
    rows = pl.LazyFrame(schema=found)
    for name, expression in source.derived.items():
        if (kind := _type(tree_of(expression), rows)) is not None:
            found[name] = kind
    return found


def _declared(schema: Schema) -> dict[str, str]:
    """The keys that columns of outcomes and side tables have their types from; empty for derived columns, which have none."""
    found = dict.fromkeys(schema.source.derived, "")
    for section, streams in (("outcomes", schema.source.outcomes), ("tables", schema.source.tables)):
        for name, stream in streams.items():
            found |= {f"{name}_{column}": f"source.{section}.{name}.columns.{column}" for column in stream.columns}
    return found


def _compared(node: Any) -> Iterator[tuple[Any, Any]]:
    """Both sides of each comparison in a tree; IN compares with a list."""
    ((kind, content),) = node.items()
    if kind == "BinaryExpr":
        below = [content["left"], content["right"]]
        compares = content["op"] in _COMPARISONS
    elif kind == "Function":
        below, function = content["input"], content["function"]
        name = name_of(function)
        compares = name == "Sql.IsIn" or (name == "Sql.Binary" and function["Sql"]["Binary"] in _COMPARISONS)
    else:
        below, compares = _below(kind, content), False
    if compares:
        yield (below[0], below[1])
    for part in below:
        yield from _compared(part)


def _below(kind: str, content: Any) -> list[Any]:
    """The parts of a node that is neither an operator nor a function."""
    return [content["expr"]] if kind == "Cast" else [*content.values()] if kind == "Ternary" else []


def _columns(node: Any) -> tuple[str, ...]:
    """The columns that a tree reads, each once."""
    return tuple(dict.fromkeys(_expression(node).meta.root_names()))


def _expression(node: Any) -> pl.Expr:
    return pl.Expr.deserialize(io.StringIO(json.dumps(node)), format="json")


def _kind(node: Any, rows: pl.LazyFrame) -> str | None:
    """What values, or a list's items, are: "text", "number" or "truth value"; None for another type and an unknown one."""
    kind = _type(node, rows)
    if isinstance(kind, pl.List):
        kind = kind.inner  # type: ignore[assignment]
    if kind is None:
        return None
    return "number" if kind.is_numeric() else {pl.String(): "text", pl.Boolean(): "truth value"}.get(kind)


def _type(node: Any, rows: pl.LazyFrame) -> pl.DataType | None:
    """The type of a tree's values; None where it reads columns of unknown types, or cannot be computed."""
    try:
        return rows.select(_expression(node).alias("value")).collect_schema()["value"]
    except FAULTS:
        return None
