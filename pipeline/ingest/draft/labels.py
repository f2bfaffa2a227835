"""Labels: columns that say by their name and values what is to be predicted, or what the user says they are."""

import re
import shlex
from dataclasses import dataclass
from typing import Literal

import polars as pl

from features.errors import UserError, did_you_mean
from features.parse.compute import number
from features.schema.expressions import column_of, columns_of, sql_name
from pipeline.ingest.draft.column import SHOWN, Column
from pipeline.ingest.draft.roles import Stream

NAME = re.compile(
    r"^((is|has|was|did)_)?(label|target|y|click(s|ed)?|clk|convert(ed)?|conversions?|purchase[ds]?|bought|buys?|order(ed|s)?"
    r"|install(ed|s)?|like[ds]?|favou?rite[ds]?|share[ds]?|follow(ed|s)?|churn(ed)?|subscribed?|responded|response|engaged?"
    r"|watched|finish(ed)?|completed?|add_?to_?cart|skip(ped)?|survived|default(ed)?|fraud)(_(label|flag|target))?$"
    r"|^label_|_label$"
)
# Two values, of which the second is the label's 1.
PAIRS = (
    ("0", "1"), ("-1", "1"), ("false", "true"), ("False", "True"), ("FALSE", "TRUE"), ("no", "yes"), ("No", "Yes"),
    ("NO", "YES"), ("n", "y"), ("N", "Y"), ("f", "t"), ("F", "T"),
)  # fmt: skip


MOST_ANSWERS = 10  # values of a column that may be a label


@dataclass(frozen=True)
class Label:
    """A task's label.

    Attributes:
        name: of the task. expression: SQL over columns of the impressions, which `columns` lists.
        numbers: those of the columns that are read as numbers, with their types.
        why: for a comment.
    """

    name: str
    kind: Literal["binary", "regression"]
    expression: str
    columns: tuple[str, ...]
    numbers: dict[str, Literal["int", "float"]]
    why: str


def seen(stream: Stream) -> list[Label]:
    """The labels that columns of the impressions are by name and values."""
    columns = [column for column in stream.columns.values() if NAME.search(column.word)]
    return [_of_pair(column, pair) for column in columns if (pair := _pair(column))]


def given(stream: Stream, text: str) -> Label:
    """The label that the user names: a column, or an expression.

    Raises:
        UserError: there is no such column, the expression cannot be computed, or it is the same for all rows.
    """
    if text in stream.columns:
        return _of_column(stream.columns[text])
    try:
        names = tuple(dict.fromkeys(columns_of(text)))
    except ValueError as error:
        raise UserError(f"label={text}: {error}") from None
    if missing := [name for name in names if name not in stream.columns]:
        near = did_you_mean(missing[0], stream.columns)
        raise UserError(
            f"label={text}: {stream.pattern} has no column {missing[0]}{near}; it has {', '.join(stream.columns)[:1000]}"
        )
    if column := column_of(text):
        return _of_column(stream.columns[column])
    values, numbers = _computed(stream, text, names)
    known = values.drop_nulls().to_numpy()
    if not len(known) or known.min() == known.max():
        always = f"{known[0]:g}" if len(known) else "missing"
        shown = "; ".join(f"{name} is {_values(stream.columns[name])}" for name in names)
        raise UserError(
            f"label={text}: it is {always} for all {len(values):,} sampled rows. {shown}. Write another expression."
        )
    binary = known.min() >= 0 and known.max() <= 1
    why = f"as given; mean {known.mean():.4f} of {len(known):,} sampled rows"
    name = re.sub(r"\W", "_", names[0])[:100] if names else "label"
    return Label(name, "binary" if binary else "regression", text, names, numbers, why)


def none_seen(folder: str, stream: Stream) -> UserError:
    """The refusal to guess, with the columns that may be meant and what to type."""
    few = [c for c in stream.columns.values() if c.counts and 2 <= c.distinct <= MOST_ANSWERS]
    # Of two values first, and the last column, where the label often stands.
    few.sort(key=lambda c: (c.distinct > 2, -list(stream.columns).index(c.name)))
    shown = "; ".join(f"{c.name} is {_values(c)}" for c in few[:5])
    examples = [_example(few[0])] if few else []
    return UserError(
        f"{folder}: no label was found: no column of {stream.pattern} has two values and a name such as click or label, and "
        f"no other files refer to its rows by a key. {f'Columns of few values: {shown}. ' if few else ''}Name one, or an "
        f"expression: {' or '.join([*examples, 'label=COLUMN'])}."
    )


def sql_text(value: str) -> str:
    """A literal text in an expression."""
    return "'" + value.replace("'", "''") + "'"


def _example(column: Column) -> str:
    """What to type for one that counts the rarest value, or the column where it is a label as it is."""
    if _pair(column) == ("0", "1"):
        return f"label={column.name}"
    word = f"label={sql_name(column.name)} = {sql_text(column.counts[-1][0])}"
    return shlex.quote(word) if set(word) & {*'"$`\\!'} else f'"{word}"'


def _values(column: Column) -> str:
    shares = (f"{value!r:.{SHOWN}} in {count / column.known:.1%}" for value, count in column.counts)
    return ", ".join(shares) or column.kind


def _pair(column: Column) -> tuple[str, str] | None:
    if column.distinct != 2 or not column.counts:
        return None
    values = {*column.texts.unique()}  # of numbers 1 for 1.0, too, which pandas writes where a label is missing
    return next((pair for pair in PAIRS if {*pair} == values), None)


def _of_pair(column: Column, pair: tuple[str, str]) -> Label:
    share = float((column.texts == pair[1]).mean())  # type: ignore[arg-type]
    name, why = sql_name(column.name), f"by its name and values; {pair[1]} in {share:.2%} of the sampled rows"
    if column.kind == "int" or column.kind == "float":
        expression = name if pair == ("0", "1") else f"{name} = {pair[1]}"
        return Label(column.name, "binary", expression, (column.name,), {column.name: column.kind}, why)
    return Label(column.name, "binary", f"{name} = {sql_text(pair[1])}", (column.name,), {}, why)


def _of_column(column: Column) -> Label:
    """A column that is named as the label. Raises UserError where it has texts: the user must name the value that is meant."""
    if pair := _pair(column):
        return _of_pair(column, pair)
    if column.kind in ("int", "float") and column.distinct > 1:
        known = column.values.drop_nulls().to_numpy()
        low, high = known.min(), known.max()
        kind: Literal["binary", "regression"] = "binary" if low >= 0 and high <= 1 else "regression"
        why = f"as given; {low:g} to {high:g}, mean {known.mean():.4g}"
        typed: Literal["int", "float"] = "int" if column.kind == "int" else "float"
        return Label(column.name, kind, sql_name(column.name), (column.name,), {column.name: typed}, why)
    example = f" Type which value counts as 1: {_example(column)}" if column.counts else " Name another column."
    raise UserError(f"label={column.name}: it is {_values(column)}.{example}")


def _computed(
    stream: Stream, text: str, names: tuple[str, ...]
) -> tuple[pl.Series, dict[str, Literal["int", "float"]]]:
    """An expression over the sample, and which columns are read as numbers for it. Raises UserError."""
    kinds: dict[str, Literal["int", "float"]] = {}
    for name in names:
        if (kind := stream.columns[name].kind) == "int" or kind == "float":
            kinds[name] = kind
    faults: list[UserError] = []
    for numbers in [kinds, {}] if kinds else [{}]:
        frame = pl.DataFrame(
            [
                (c.values if name in numbers or c.kind == "text" else c.values.cast(pl.String)).alias(name)
                for name in names
                if (c := stream.columns[name]).values.dtype != pl.List
            ]
        )
        try:
            return number(frame, f"label={text}", text, "label"), numbers
        except UserError as fault:
            faults.append(fault)
    raise faults[0]  # of numbers where there are any: the other one is of those as text, too
