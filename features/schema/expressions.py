"""SQL expressions over the columns of one row: what may be written in a schema."""

import io
import json
import re
from functools import lru_cache
from typing import Any

import polars as pl

from features.printable import printable
from features.schema.expression_size import Size, size_of
from features.schema.expression_tree import MAX_DEPTH, not_allowed

# Limits of the text: polars' parser recurses, and a stack that overflows or a parse that never ends cannot be caught.
MAX_LENGTH = 10_000  # characters
MAX_WORDS = 500  # words and signs, beside literals: 1,000 can overflow the stack of a thread of 2 MiB
MAX_BRACKETS = 16  # within each other: each may double the time in which an error is found
MAX_TREE = 1 << 18  # bytes of the tree: NULLIF, BETWEEN and IN repeat what they compare, so that it can double at each

_QUOTED = r"""'[^']*'|"[^"]*"|`[^`]*`|(?<![\w$])(?P<tag>\$\w*\$).*?(?P=tag)"""
_TOKEN = re.compile(rf"(?P<comment>--|/\*)|{_QUOTED}", re.DOTALL)
_ESCAPES = re.compile(r"""[\\$]|--|/\*""")  # where quotes may end elsewhere than _QUOTED thinks
_PREFIXED = re.compile(r"\w''")  # the same, once quoted text is '': q'[a'b]'
_QUERY = re.compile(r"\b(?:select\b|from\b|values\s*\(|values\s+row\b)", re.IGNORECASE)
_MOMENT = re.compile(r"\b(?:date|datetime|time|timestamp)\s*$", re.IGNORECASE)
_INTERVAL = re.compile(r"\binterval\b(?!\s*')", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d]\w*|[^\w\s,()']")

FAULTS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError)


def columns_of(expression: str) -> list[str]:
    """Columns that a SQL expression reads.

    Raises:
        ValueError: it cannot be parsed, holds a query of its own, which could reach files (and would, by being parsed), its
            value may depend on more than its row: on other rows, and so on where a block of rows ends, or on the clock; or
            it is too long, too deeply nested, or may need more memory than a small multiple of its row.
    """
    return list(_checked(expression)[0])


@lru_cache(maxsize=1024)
def column_of(expression: str) -> str | None:
    """The column that an expression is, quoted or in brackets, too; None for another. Raises ValueError as `columns_of`."""
    columns = columns_of(expression)
    return columns[0] if len(columns) == 1 and tree_of(expression) == {"Column": columns[0]} else None


def sql_name(column: str) -> str:
    """A column in an expression, quoted where its name could be something else."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column):
        try:
            if columns_of(column) == [column]:
                return column
        except ValueError:  # a keyword
            pass
    return '"' + column.replace('"', '""') + '"'


def memory_of(expression: str) -> Size:
    """The memory that computing an expression needs for a row, at most. Raises ValueError as `columns_of` does."""
    return _checked(expression)[1]


def shown(expression: str) -> str:
    """An expression, or its beginning, for a message of one line."""
    return repr(expression if len(expression) <= 200 else f"{expression[:200]}…")


@lru_cache(maxsize=1024)
def _checked(expression: str) -> tuple[tuple[str, ...], Size]:
    _check_text(expression)
    try:
        tree, written = tree_of(expression), _moments(expression)
        beyond = dict.fromkeys(not_allowed(tree, written))
    except _TooLargeError:
        raise ValueError(
            f"{shown(expression)} is too large once parsed: nest fewer NULLIF, BETWEEN, IN and CASE"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{shown(expression)} is nested too deeply: allowed are {MAX_DEPTH} operators that work on each other"
        ) from None
    except FAULTS as error:
        raise ValueError(f"{shown(expression)} is not a SQL expression: {reason(error)}") from None
    try:
        meta = pl.sql_expr(expression).meta
        if meta.has_multiple_outputs():
            raise ValueError("stands for several columns: name the one that is meant")
        if beyond:
            raise ValueError(
                f"uses {', '.join(beyond)}: an expression may only use columns of its row and functions of them"
            )
        return tuple(meta.root_names()), size_of(tree)
    except FAULTS as error:
        raise ValueError(f"{shown(expression)} {reason(error)}") from None


def reason(error: BaseException) -> str:
    """The first line of what polars says."""
    return printable(next(iter(str(error).splitlines()), type(error).__name__))[:500]


def _check_text(expression: str) -> None:
    """Refuses, before polars parses it, what it must not parse. Raises ValueError."""
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"{shown(expression)} has {len(expression):,} characters: allowed are {MAX_LENGTH:,}")
    bare = _TOKEN.sub(lambda token: token["comment"] or "''", expression)
    text = expression if _ESCAPES.search(expression) or _PREFIXED.search(bare) else bare
    if _QUERY.search(text):
        raise ValueError(f"{shown(expression)} holds a query: an expression may only read columns of its row")
    if comment := next((t["comment"] for t in _TOKEN.finditer(expression) if t["comment"]), None):
        raise ValueError(
            f"{shown(expression)} holds a comment ({comment}): remove it, and write - - for two minus signs"
        )
    if (words := len(_WORD.findall(text))) > MAX_WORDS:
        raise ValueError(f"{shown(expression)} has {words:,} words and signs: allowed are {MAX_WORDS}")
    if _brackets(text) > MAX_BRACKETS:
        raise ValueError(f"{shown(expression)} has more than {MAX_BRACKETS} brackets within each other")
    if _INTERVAL.search(text):
        raise ValueError(f"{shown(expression)} has an INTERVAL without a literal: write it as INTERVAL '1 day'")


def _brackets(text: str) -> int:
    """The most brackets within each other, whether or not they are closed."""
    most = 0
    open_ = dict.fromkeys("([{", 0)
    opened = dict(zip(")]}", open_, strict=True))
    for sign in re.findall(r"[()\[\]{}]", text):
        if sign in open_:
            open_[sign] += 1
        else:
            open_[opened[sign]] = max(0, open_[opened[sign]] - 1)
        most = max(most, sum(open_.values()))
    return most


class _TooLargeError(Exception):
    """A tree of more than MAX_TREE bytes."""


class _Bounded(io.RawIOBase):
    """Takes MAX_TREE bytes, then refuses: a tree may be exponentially larger than its text."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.full = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.full or len(self.data) + len(data) > MAX_TREE:
            self.full = True
            raise _TooLargeError
        self.data += data
        return len(data)


def tree_of(expression: str) -> Any:
    """The tree of an expression whose text was checked, as polars serializes it. Raises _TooLargeError, or as polars does."""
    written = _Bounded()
    try:
        pl.sql_expr(expression).meta.serialize(written, format="json")
    except pl.exceptions.PolarsError:
        if written.full:
            raise _TooLargeError from None
        raise
    return json.loads(written.data)


def _moments(expression: str) -> list[Any]:
    """The literals that an expression spells out, such as DATE '2020-01-01'. A call of the clock becomes one, too."""
    found = [(_MOMENT.search(expression[: token.start()]), token[0]) for token in _TOKEN.finditer(expression)]
    trees = [tree_of(kind[0] + text) for kind, text in found if kind]
    return [tree["Literal"] for tree in trees if "Literal" in tree]  # DATE `a` is a column by another name
