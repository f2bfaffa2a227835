"""From raw text to typed rows: casts, outcomes, derived columns, labels and split of a block of rows at a time."""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from features.errors import UserError
from features.hashing import hash_strings
from features.schema import RAW_TYPES, SPLITS, HashSplit, RawType, RowIndexSplit, Schema

SPLIT = "__split"  # index into SPLITS
ROW_ID = "__row_id"
WEIGHT = "__weight"
HASH_SPLIT_SEED = 7  # apart from the buckets of a hash table over the same column


@dataclass(frozen=True)
class Parsed:
    """A block of rows, good ones apart from bad ones.

    Attributes:
        rows: raw and derived columns with their types, `label.TASK` (null = not observed), SPLIT, ROW_ID, WEIGHT.
        letters: what is wrong with the others: line, reason, raw.
    """

    rows: pl.DataFrame
    letters: pl.DataFrame


def parse(schema: Schema, raw: pl.DataFrame, outcomes: dict[str, pl.DataFrame], row: int, row_id: int) -> Parsed:
    """Types a block of rows and says which of them cannot be used, and why.

    Args:
        raw: the block, every column of `schema.raw_columns` as text.
        outcomes: per outcome its first event of each key, from `first_outcomes`.
        row: index of the block's first row in its file.
        row_id: id of the block's first row where the schema names no `row_id` column.
    """
    text = clean(schema, raw)
    frame, reason = cast(text, schema.raw_types)
    for name, events in outcomes.items():
        # By the key's text: the streams' keys are text, whatever type the impressions' key has for other uses.
        found = text.select(pl.col(str(schema.source.key)).alias("key")).join(
            events, on="key", how="left", maintain_order="left"
        )
        frame = frame.hstack(found.drop("key").with_columns(pl.col(name).fill_null(False)))
    frame = frame.with_columns(evaluate(frame, f"source.derived.{n}", e, n) for n, e in schema.source.derived.items())
    _check_types(schema, frame)
    frame = frame.with_columns(_label(schema, frame, name) for name in schema.tasks)
    frame = frame.with_columns(
        _split(schema, frame, row),
        _weight(schema, frame),
        (pl.col(schema.source.row_id) if schema.source.row_id else pl.int_range(pl.len()) + row_id).alias(ROW_ID),
    )
    reason = frame.select(
        pl.coalesce(reason, *_impossible(schema), pl.lit(None, pl.String)).alias("reason")
    ).to_series()
    bad = reason.is_not_null()
    letters = pl.DataFrame(
        {"line": bad.arg_true().cast(pl.Int64) + row, "reason": reason.filter(bad), "raw": _as_text(raw.filter(bad))}
    )
    return Parsed(frame.filter(~bad), letters)


def clean(schema: Schema, raw: pl.DataFrame) -> pl.DataFrame:
    """Text columns with spaces stripped where the schema says so and missing markers as nulls."""
    column = pl.all().str.strip_chars() if schema.source.trim else pl.all()
    missing = schema.source.missing
    return raw.select(pl.when(column.is_in(missing)).then(None).otherwise(column).name.keep() if missing else column)


def cast(text: pl.DataFrame, types: dict[str, RawType]) -> tuple[pl.DataFrame, pl.Series]:
    """Casts text columns.

    Returns:
        The frame, and per row what is wrong with its first bad cell (null where nothing is).
    """
    types = {c: t for c, t in types.items() if t != "string" and c in text.columns}
    frame = text.with_columns(pl.col(c).cast(RAW_TYPES[t], strict=False) for c, t in types.items())
    reason = pl.Series("reason", [None], dtype=pl.String).new_from_index(0, text.height)
    for column, kind in types.items():
        wrong = text[column].is_not_null() & (frame[column].is_null() | ~frame[column].is_finite().fill_null(True))
        if wrong.any():
            shown = pl.format(
                "{}: '{}' is not " + ("a number" if kind == "float" else "an integer"), pl.lit(column), column
            )
            reason = text.select(pl.when(wrong & reason.is_null()).then(shown).otherwise(reason).alias("reason"))[
                "reason"
            ]
    return frame, reason


def first_outcomes(events: pl.DataFrame, name: str, key: str, types: dict[str, RawType]) -> pl.DataFrame:
    """One row for each key of an outcome stream: its first event, columns named as expressions see them.

    Raises:
        UserError: a value that is not of its declared type.
    """
    frame, reason = cast(events, types)
    if (bad := reason.is_not_null()).any():
        raise UserError(f"outcome {name}, line {bad.arg_true()[0] + 2}: {reason.filter(bad)[0]}")
    frame = frame.drop_nulls(key).unique(key, keep="first", maintain_order=True)
    return frame.select(
        pl.col(key).alias("key"), pl.lit(True).alias(name), *(pl.col(c).alias(f"{name}_{c}") for c in types)
    )


def evaluate(frame: pl.DataFrame, key: str, expression: str, name: str) -> pl.Series:
    """A SQL expression over the columns of a block, one value a row.

    Raises:
        UserError: the expression does not fit the columns (no such column, wrong type).
    """
    try:
        series = frame.select(pl.sql_expr(expression).alias(name)).to_series()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{key}: {expression!r} cannot be computed: {str(error).splitlines()[0]}") from None
    return series if series.len() == frame.height else series.new_from_index(0, frame.height)


def _number(frame: pl.DataFrame, key: str, expression: str, name: str) -> pl.Series:
    """`evaluate`, where text is not a value. Raises UserError."""
    series = evaluate(frame, key, expression, name)
    if series.dtype == pl.String:
        raise UserError(f"{key}: {expression!r} is text: compare it with a value, or set source.types")
    return series.cast(pl.Float32)


def _check_types(schema: Schema, frame: pl.DataFrame) -> None:
    """Raises UserError for a column, mostly a derived one, that is not of the type that its use needs."""
    for name, feature in schema.dense.items():
        kind = frame[feature.column or name].dtype
        if not (kind.is_numeric() or kind in (pl.Boolean, pl.Null)):
            raise UserError(f"dense.{name}: column {feature.column or name} is {kind}, it must be a number")
    for key, column in (("event_time", schema.event_time), ("source.row_id", schema.source.row_id)):
        if column and not frame[column].dtype.is_integer():
            raise UserError(f"{key}: column {column} is {frame[column].dtype}, it must be an integer")


def _label(schema: Schema, frame: pl.DataFrame, name: str) -> pl.Series:
    task = schema.tasks[name]
    label = _number(frame, f"tasks.{name}.label", task.label, f"label.{name}")
    if task.observed_when is None:
        return label
    observed = _number(frame, f"tasks.{name}.observed_when", task.observed_when, "observed").cast(pl.Boolean)
    return label.zip_with(observed.fill_null(False), pl.Series([None], dtype=pl.Float32).new_from_index(0, len(label)))


def _weight(schema: Schema, frame: pl.DataFrame) -> pl.Series:
    if schema.weight is None:
        return pl.Series(WEIGHT, [1.0], dtype=pl.Float32).new_from_index(0, frame.height).alias(WEIGHT)
    return _number(frame, "weight", schema.weight, WEIGHT)


def _split(schema: Schema, frame: pl.DataFrame, row: int) -> pl.Series:
    split = schema.split
    if isinstance(split, RowIndexSplit):
        of_remainder = np.empty(split.modulo, np.int8)
        for number, name in enumerate(SPLITS):
            of_remainder[getattr(split, name)] = number
        return pl.Series(SPLIT, of_remainder[(np.arange(frame.height) + row) % split.modulo])
    if isinstance(split, HashSplit):
        keys = frame[split.key].cast(pl.String)
        share = hash_strings(keys.to_arrow(), HASH_SPLIT_SEED) / 2.0**64
        code = np.where(share < split.test, 2, np.where(share < split.test + split.valid, 1, 0)).astype(np.int8)
        return pl.Series(SPLIT, code).zip_with(keys.is_not_null(), pl.Series([None], dtype=pl.Int8))
    valid_from, test_from = (math.ceil(moment.timestamp()) for moment in (split.valid_from, split.test_from))
    time = pl.col(str(schema.event_time))
    return frame.select(
        ((time >= valid_from).cast(pl.Int8) + (time >= test_from).cast(pl.Int8)).alias(SPLIT)
    ).to_series()


def _impossible(schema: Schema) -> list[pl.Expr]:
    """What makes a typed row unusable, each an expression that is null where all is well."""
    faults: list[pl.Expr] = []
    for name, feature in schema.dense.items():
        x = pl.col(feature.column or name)
        # Infinite after LN(0), or too large for the dataset: one such value would spoil every row's by its mean.
        faults.append(
            pl.when(x.cast(pl.Float32).is_infinite()).then(pl.format(f"{name}: {{}} is not a finite number", x))
        )
    for name, task in schema.tasks.items():
        label = pl.col(f"label.{name}")
        allowed = label.is_between(0, 1) if task.kind == "binary" else label.is_finite()
        words = "a label in [0, 1]" if task.kind == "binary" else "a finite label"
        faults.append(pl.when(~allowed).then(pl.format(f"tasks.{name}: {{}} is not {words}", label)))
    weight = pl.col(WEIGHT)
    faults.append(
        pl.when(weight.is_null() | weight.is_nan() | ~(weight >= 0) | weight.is_infinite()).then(
            pl.format("weight: {} is not a number >= 0", weight.cast(pl.String).fill_null("missing"))
        )
    )
    faults.append(pl.when(pl.col(SPLIT).is_null()).then(pl.lit("split: its key or time is missing")))
    if schema.event_time:
        faults.append(
            pl.when(pl.col(schema.event_time).is_null()).then(pl.lit(f"{schema.event_time}: missing event time"))
        )
    if schema.source.row_id:
        faults.append(pl.when(pl.col(ROW_ID).is_null()).then(pl.lit(f"{schema.source.row_id}: missing row id")))
        # -1 marks the padding of a batch.
        negative = pl.format(f"{schema.source.row_id}: {{}} is not a row id >= 0", pl.col(ROW_ID))
        faults.append(pl.when(pl.col(ROW_ID) < 0).then(negative))
    return faults


def _as_text(raw: pl.DataFrame) -> pl.Series:
    """The cells that were read, as JSON, for a person to look at."""
    return raw.select(pl.struct(pl.all()).struct.json_encode().alias("raw")).to_series()
