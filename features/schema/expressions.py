"""SQL expressions over the columns of one row: what may be written in a schema."""

import re

import polars as pl

_QUOTED = r"""'[^']*'|"[^"]*"|`[^`]*`|(?<![\w$])(?P<tag>\$\w*\$).*?(?P=tag)"""
_TOKEN = re.compile(rf"(?P<comment>--|/\*)|{_QUOTED}", re.DOTALL)
_ESCAPES = re.compile(r"""[\\$]|--|/\*""")  # where quotes may end elsewhere than _QUOTED thinks
_QUERY = re.compile(r"\b(select|from)\b", re.IGNORECASE)
_BEYOND_ROW = re.compile(
    # Aggregates, places of a row among others, comparisons with a whole column, and more rows than there are.
    r"\bover\b|\b(avg|count|sum|total|min|max|median|\w+_value|first|last|std\w*|var\w*|\w*quantile\w*|corr|covar\w*|"
    r"\w+_agg|listagg|group_concat|grouping|row_number|\w*rank|cume_dist|ntile|lag|lead|all|any|some|"
    r"unnest|explode)\s*\(|"
    # The clock.
    r"\bnow\s*\(|\b(current_(date|time|timestamp)|localtime|localtimestamp)\b|"
    # Names of functions in quotes.
    r"''\s*\(",
    re.IGNORECASE,
)


def columns_of(expression: str) -> list[str]:
    """Columns that a SQL expression reads.

    Raises:
        ValueError: it cannot be parsed, holds a query of its own, which could reach files (and would, by being parsed), or
            its value depends on more than its row: on other rows, and so on where a block of rows ends, or on the clock.
    """
    bare = _TOKEN.sub(lambda token: token["comment"] or "''", expression)
    if _QUERY.search(expression if _ESCAPES.search(expression) else bare):
        raise ValueError(f"{expression!r} holds a query: an expression may only read columns of its row")
    if comment := next((t["comment"] for t in _TOKEN.finditer(expression) if t["comment"]), None):
        raise ValueError(f"{expression!r} holds a comment ({comment}): take it out, and write - - for two minus signs")
    if beyond := _BEYOND_ROW.search(bare):
        said = "a function in quotes" if beyond[0].startswith("'") else beyond[0].rstrip("(").rstrip()
        raise ValueError(f"{expression!r} looks beyond its row ({said}): it may only read columns of its row")
    try:
        meta = pl.sql_expr(expression).meta
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise ValueError(f"{expression!r} is not a SQL expression: {error}") from None
    if meta.has_multiple_outputs():
        raise ValueError(f"{expression!r} stands for several columns: name the one that is meant")
    return meta.root_names()
