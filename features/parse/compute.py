"""SQL expressions over the columns of a block of rows: derived columns, labels, conditions, weights."""

from collections.abc import Iterator

import polars as pl

from features.errors import UserError
from features.schema.comparisons import mixed_comparison
from features.schema.expression_size import Size
from features.schema.expressions import columns_of, memory_of, reason, shown

SLICE_BYTES = 256 << 20  # what an expression may need at a time; where it may need more, it is computed for fewer rows
FIRST_DAY, END_DAY = -719_162, 2_932_897  # 1 January of the years 1 and 10000, in days since 1970
DERIVED_BYTES = 1 << 30  # texts and lists that the derived columns of a block may hold


def derived(frame: pl.DataFrame, expressions: dict[str, str]) -> list[pl.Series]:
    """The derived columns of a block, by name.

    Raises:
        UserError: one cannot be computed or has values that no dataset holds, or the texts of all are too large.
    """
    room, found = DERIVED_BYTES, []
    for name, text in expressions.items():
        series = evaluate(frame, f"source.derived.{name}", text, name, room)
        room -= _text_bytes(series)
        if not _is_storable(series):
            raise UserError(f"source.derived.{name}: it is {series.dtype}, or beyond the years 1 to 9999: cast it")
        # 0 / 0 is no value, neither as a number nor as an id.
        found.append(series.fill_nan(None) if series.dtype.is_float() else series)
    return found


def evaluate(frame: pl.DataFrame, key: str, expression: str, name: str, room: int = DERIVED_BYTES) -> pl.Series:
    """A SQL expression over the columns of a block, one value a row.

    Args:
        room: bytes that texts and lists of the result may need.

    Raises:
        UserError: the expression does not fit the columns (no such column, wrong type, text compared with a number), or its
            texts do not fit into `room`.
    """
    types = {column: frame.schema[column] for column in columns_of(expression) if column in frame.columns}
    if wrong := mixed_comparison(expression, types):
        raise UserError(f"{key}: {wrong}")
    pieces: list[pl.Series] = []
    for part in _slices(frame, memory_of(expression)):
        try:
            series = part.select(pl.sql_expr(expression).alias(name)).to_series()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise UserError(f"{key}: {shown(expression)} cannot be computed: {reason(error)}") from None
        pieces.append(series if series.len() == part.height else series.new_from_index(0, part.height))
        room -= _text_bytes(pieces[-1])
        if room < 0:
            raise UserError(
                f"{key}: {shown(expression)} makes texts of more than 1 GiB of one block of rows, with the derived columns "
                "before it: make them shorter"
            )
    return pieces[0] if len(pieces) == 1 else pl.concat(pieces)


def _slices(frame: pl.DataFrame, size: Size) -> Iterator[pl.DataFrame]:
    """Runs of a block's rows that an expression can be computed for in SLICE_BYTES, or single rows."""
    read = (times * frame[column].estimated_size() for column, times in size.times.items() if column in frame.columns)
    if frame.height < 2 or sum(read) + size.fixed * frame.height <= SLICE_BYTES:
        yield frame
    else:
        yield from _slices(frame.slice(0, frame.height // 2), size)
        yield from _slices(frame.slice(frame.height // 2), size)


def _text_bytes(values: pl.Series) -> int:
    return int(values.estimated_size()) if values.dtype == pl.String or values.dtype.is_nested() else 0


def _is_storable(values: pl.Series) -> bool:
    """Whether a column of a type may be derived: numbers, text, dates, lists of them; not intervals, or numbers of 128 bits."""
    kind = values.dtype
    if kind in (pl.Date, pl.Datetime):
        seconds = {"ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
        day = 86_400 * seconds[kind.time_unit] if isinstance(kind, pl.Datetime) else 1
        first, last = max(FIRST_DAY * day, -(2**63)), min(END_DAY * day, 2**63) - 1
        return bool(values.to_physical().is_between(first, last).all())
    if isinstance(kind, pl.List):
        inner = kind.inner
        return inner not in (pl.Int128, pl.UInt128) and (
            inner.is_numeric() or inner in (pl.String, pl.Boolean, pl.Null)
        )
    return kind not in (pl.Int128, pl.UInt128, pl.Duration)


def truth(frame: pl.DataFrame, key: str, expression: str) -> pl.Series:
    """A SQL condition, false where it is null. Raises UserError where it is text."""
    return number(frame, key, expression, "truth").cast(pl.Boolean).fill_null(False)


def number(
    frame: pl.DataFrame, key: str, expression: str, name: str, kind: type[pl.DataType] = pl.Float32
) -> pl.Series:
    """`evaluate` as a type of numbers, where text is not a value. Raises UserError."""
    series = evaluate(frame, key, expression, name)
    if series.dtype.is_nested():
        raise UserError(f"{key}: {shown(expression)} is {series.dtype}: it must be a number")
    if series.dtype == pl.String:
        raise UserError(f"{key}: {shown(expression)} is text: compare it with a value, or set source.types")
    return cast(series, key, kind)


def cast(series: pl.Series, key: str, kind: type[pl.DataType]) -> pl.Series:
    """A column as another type. Raises UserError for a value that the type does not hold, as 2^64 - 1 in int64."""
    try:
        return series.cast(kind)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UserError(f"{key}: {reason(error)}") from None
