"""SQL expressions over the columns of one row: what may be written in a schema."""

import re

import polars as pl

_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`""")
_ESCAPES = re.compile(r"""[\\$]|--|/\*""")  # where quotes may end elsewhere than _QUOTED thinks
_QUERY = re.compile(r"\b(select|from)\b", re.IGNORECASE)
_OTHER_ROWS = re.compile(
    r"\bover\b|\b(any_value|avg|count|sum|min|max|first|last|median|mode|std\w*|var\w*|quantile\w*|corr|covar\w*|"
    r"\w+_agg|listagg|bit_and|bit_or|bit_xor|bool_and|bool_or|unnest|explode)\s*\(",
    re.IGNORECASE,
)


def columns_of(expression: str) -> list[str]:
    """Columns that a SQL expression reads.

    Raises:
        ValueError: it cannot be parsed, holds a query of its own, which could reach files (and would, by being parsed),
            or looks at other rows, so that its value would depend on where a block of rows ends.
    """
    bare = _QUOTED.sub("''", expression)
    if _QUERY.search(expression if _ESCAPES.search(expression) else bare):
        raise ValueError(f"{expression!r} holds a query: an expression may only read columns of its row")
    if other := _OTHER_ROWS.search(bare):
        raise ValueError(f"{expression!r} looks at other rows ({other[0]}): it may only read columns of its row")
    try:
        meta = pl.sql_expr(expression).meta
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise ValueError(f"{expression!r} is not a SQL expression: {error}") from None
    if meta.has_multiple_outputs():
        raise ValueError(f"{expression!r} stands for several columns: name the one that is meant")
    return meta.root_names()
