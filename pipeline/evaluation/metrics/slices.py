"""Slices of a split: by the values of kept columns and features, by ranges, by SQL, by crosses, by cold start and by time.

The slices of a dimension are found in one reading of its columns before the first checkpoint is scored; from then on each row
group's rows get the number of their slice while it is decoded. A text in a slice's name is in quotes where it could be read
as something else: `device="missing"` are the rows whose device is called so, `device=missing` those without one.
"""

# Shapes: N rows, V values of a dimension, S slices of it.

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError, did_you_mean, one_line
from features.fit.encoders import MISSING
from features.parse.compute import evaluate
from features.schema.expressions import columns_of, shown
from features.schema.kept import TEXT, kept_column
from features.time_units import INDEX
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.shards import with_plain_texts
from pipeline.evaluation.metrics.settings import Edges, MeasureConfig, Sql

NO_SLICE = -1
MAX_VALUES = 1 << 20  # of a dimension, of which the most frequent are slices
MAX_ORDERED = 1 << 14  # slices of a dimension that has an order; int16 numbers them
MAX_TABLE = 1 << 16  # places of a table of integers
RESERVED = ("missing", "unseen")  # what names of slices call ids and values that are none
DAY = 86_400
DAYS = (0, 47_482)  # since 1970, to the end of 2099: of these a slice can be asked for by name


class Dimension(ABC):
    """One way to divide the rows.

    Attributes:
        name: as in `Evaluated.figures`. columns: of the dataset that it needs.
        has_order: its slices are listed by value, and not only the most frequent ones but all of them.
        possible: the values that it may have, whatever the rows are; None: any.
    """

    name: str
    columns: Sequence[str]
    has_order = False
    possible: Iterable[object] | None = None

    @abstractmethod
    def values(self, table: pa.Table) -> pa.Array:
        """Of N rows the value, of any type; null: missing."""

    def label(self, value: object) -> str | None:
        """The slice's name; None where the value is no slice."""
        return f"{self.name}={'missing' if value is None else _shown(value)}"

    @property
    def slice_names(self) -> list[str] | None:
        """Of the slices that it may have; None: `column=value` of any value, for each column of a cross."""
        return None if self.possible is None else [name for value in self.possible if (name := self.label(value))]


class _Column(Dimension):
    """The values of a kept column."""

    def __init__(self, name: str, column: str) -> None:
        self.name, self.columns = name, [column]

    def values(self, table: pa.Table) -> pa.Array:
        value_N = table[self.columns[0]].combine_chunks()
        return pc.add(value_N, 0.0) if pa.types.is_floating(value_N.type) else value_N  # -0.0 is 0.0


class _Feature(Dimension):
    """The values of a categorical feature with a vocabulary, by their ids."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self.name, self.columns = name, [name]
        table = dataset.schema.table_of(name)
        unknown = dataset.encoders.unknown_ids(table)
        assert unknown is not None
        self.unknown, self.vocabulary = unknown, dataset.encoders.vocabularies[table]

    def values(self, table: pa.Table) -> pa.Array:
        id_N = table[self.name].to_numpy()
        unseen_N = (id_N >= self.unknown.start) & (id_N < self.unknown.stop)
        return pa.array(np.where(unseen_N, self.unknown.start, id_N))

    def label(self, value: object) -> str | None:
        assert isinstance(value, int)
        if value in (MISSING, self.unknown.start):
            return f"{self.name}={'missing' if value == MISSING else 'unseen'}"
        return f"{self.name}={_shown(self.vocabulary[value - self.unknown.stop].as_py())}"


class _Edges(Dimension):
    """Ranges of a number in its unit: of a kept column, or of a dense feature.

    A dense feature without `missing_flag` has the mean where it is missing, and is in the range of that.
    """

    has_order = True

    def __init__(self, settings: Edges, dataset: Dataset) -> None:
        self.name, self.edges, self.possible = settings.column, settings.edges, (*range(len(settings.edges) + 1), None)
        schema, column = dataset.schema, kept_column(settings.column)
        if schema.kept.get(column, TEXT) != TEXT:
            self.columns, self.cut_V = [column], np.array(settings.edges, np.float64)
            return
        if settings.column in schema.keep and settings.column not in schema.dense:
            raise UserError(
                f"slices: {settings.column} is kept as text, which has no edges: add {{{settings.column}: int}}, or float, to "
                "source.types in the schema and run jobs.preprocess again"
            )
        if settings.column not in schema.dense:
            raise UserError(_unknown(settings.column, dataset, "a number"))
        feature = schema.dense[settings.column]
        self.columns = list(feature.fields(settings.column))
        encoded = feature.encode(settings.column, pa.array(settings.edges, pa.float64()), dataset.encoders)
        self.cut_V = encoded[settings.column].to_numpy().astype(np.float64)
        if not (np.diff(self.cut_V) > 0).all():
            raise UserError(
                f"slices: edges of {settings.column} are closer to each other than float32, in which {dataset.path} has the "
                "feature, can distinguish: leave some out"
            )

    def values(self, table: pa.Table) -> pa.Array:
        column, *flag = (table[name].combine_chunks() for name in self.columns)
        value_N = column.cast(pa.float64())
        place_N = np.searchsorted(self.cut_V, value_N.fill_null(np.nan).to_numpy(), side="right")
        missing_N = flag[0].to_numpy() > 0 if flag else ~value_N.is_valid().to_numpy(False)
        return pa.array(place_N, mask=missing_N)

    def label(self, value: object) -> str | None:
        if not isinstance(value, int):
            return f"{self.name} missing"
        edges = [str(int(edge)) if edge.is_integer() else repr(edge) for edge in self.edges]
        if value == 0:
            return f"{self.name} below {edges[0]}"
        return (
            f"{self.name} {edges[value - 1]}..{edges[value]}" if value < len(edges) else f"{self.name} from {edges[-1]}"
        )


class _Sql(Dimension):
    """The rows for which a condition over kept columns holds."""

    possible = (True,)

    def __init__(self, settings: Sql, dataset: Dataset) -> None:
        self.sql, self.name = settings.sql, " ".join(settings.sql.split())
        try:
            names = list(dict.fromkeys(columns_of(settings.sql)))
        except ValueError as error:
            raise UserError(f"slices: sql: {shown(settings.sql)}: {one_line(error)}") from None
        if not names:
            raise UserError(
                f"slices: sql: {shown(settings.sql)} reads no column: write a condition, such as position <= 3"
            )
        if missing := [name for name in names if name not in dataset.schema.keep]:
            raise UserError(_unknown(missing[0], dataset, "a kept column"))
        self.names, self.path = names, dataset.path
        self.columns = [kept_column(name) for name in names]

    def values(self, table: pa.Table) -> pa.Array:
        renamed = with_plain_texts(table.select(self.columns).rename_columns(self.names), self.path)
        frame = pl.from_arrow(renamed)
        assert isinstance(frame, pl.DataFrame)
        found = evaluate(frame, "slices.sql", self.sql, "holds")
        if found.dtype != pl.Boolean:
            raise UserError(
                f"slices: sql: {shown(self.sql)} is {found.dtype}, a condition is needed, such as position <= 3"
            )
        return found.fill_null(False).to_arrow()

    def label(self, value: object) -> str | None:
        return self.name if value else None


class _ColdStart(Dimension):
    """Ids of a feature that training has not seen, or rarely, or that are missing."""

    STATES = ("seen", "missing", "unseen", "rare")
    possible = range(len(STATES))

    def __init__(self, feature: str, dataset: Dataset, rare: int) -> None:
        self.name, self.feature, self.columns = f"{feature} (cold start)", feature, [feature]
        encoders, table = dataset.encoders, dataset.schema.table_of(feature)
        unknown = encoders.unknown_ids(table)
        assert unknown is not None
        state_V = np.zeros(encoders.num_embeddings(table), np.int8)
        count_V = encoders.counts.get(table, np.zeros(0, np.int64))
        state_V[unknown.stop : unknown.stop + len(count_V)][count_V < rare] = 3
        state_V[MISSING], state_V[unknown.start : unknown.stop] = 1, 2
        self.state_V = state_V

    def values(self, table: pa.Table) -> pa.Array:
        return pa.array(self.state_V[table[self.feature].to_numpy()])

    def label(self, value: object) -> str | None:
        assert isinstance(value, int)
        return f"{self.feature}: {self.STATES[value]}" if value else None


class _Time(Dimension):
    """Days or hours of the day of the event time, in UTC."""

    has_order = True

    def __init__(self, name: str) -> None:
        self.name, self.columns = name, ["event_time"]
        self.possible = range(24) if name == "hour" else range(*DAYS)

    def values(self, table: pa.Table) -> pa.Array:
        time_N = table["event_time"].combine_chunks()
        at_N = time_N.fill_null(0).to_numpy()
        return pa.array(
            at_N // DAY if self.name == "day" else at_N % DAY // 3600, mask=~time_N.is_valid().to_numpy(False)
        )

    def label(self, value: object) -> str | None:
        if not isinstance(value, int):
            return None
        if self.name == "hour":
            return f"hour={value:02d}"
        return f"day={np.datetime64(value, 'D')}"


class _Cross(Dimension):
    """Combinations of the values of other dimensions."""

    def __init__(self, parts: Sequence[Dimension]) -> None:
        self.parts = parts
        self.name = ", ".join(part.name for part in parts)
        _refuse_repeated([part.name for part in parts], f"in the cross {self.name}")
        self.columns = list(dict.fromkeys(column for part in parts for column in part.columns))

    def values(self, table: pa.Table) -> pa.Array:
        columns = [part.values(table) for part in self.parts]
        return pa.StructArray.from_arrays(columns, [str(place) for place in range(len(columns))])

    def label(self, value: object) -> str | None:
        assert isinstance(value, dict)
        labels = [part.label(of_part) for part, of_part in zip(self.parts, value.values(), strict=True)]
        return None if None in labels else ", ".join(map(str, labels))


def dimensions(config: MeasureConfig, dataset: Dataset) -> list[Dimension]:
    """The dimensions of the settings. Raises UserError for a column that the dataset does not have."""
    found = [_dimension(entry, dataset) for entry in config.slices]
    schema = dataset.schema
    if config.cold_start:
        found += [
            _ColdStart(name, dataset, config.rare)
            for name in schema.single
            if dataset.encoders.unknown_ids(schema.table_of(name)) is not None
        ]
    if schema.event_time and schema.source.times.get(schema.event_time) != INDEX:
        found += [_Time(name) for name in config.by_time]
    _refuse_repeated([d.name for d in found], "as a dimension (by_time makes day and hour)")
    return found


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"slices: {repeated} is there twice {where}: leave one out")


def _dimension(entry: str | Sequence[str] | Edges | Sql, dataset: Dataset) -> Dimension:
    if isinstance(entry, Edges):
        return _Edges(entry, dataset)
    if isinstance(entry, Sql):
        return _Sql(entry, dataset)
    if not isinstance(entry, str):
        return _Cross([_dimension(part, dataset) for part in entry])
    if entry in dataset.schema.keep:
        return _Column(entry, kept_column(entry))
    single = dataset.schema.single
    if entry in single and dataset.encoders.unknown_ids(dataset.schema.table_of(entry)) is not None:
        return _Feature(entry, dataset)
    raise UserError(_unknown(entry, dataset, "a kept column or a categorical feature with a vocabulary"))


def _unknown(name: str, dataset: Dataset, what: str) -> str:
    known = [*dataset.schema.keep, *dataset.schema.single, *dataset.schema.dense]
    return (
        f"slices: {name} is not {what} of {dataset.path}{did_you_mean(name, known)}: add it to `keep` in the schema and run "
        "jobs.preprocess again, or leave it out"
    )


def _shown(value: object) -> object:
    """A value in the name of a slice: a text in quotes, as in JSON, where it could be read as something else."""
    if not isinstance(value, str):
        return value
    is_plain = value.isprintable() and value.strip() == value and not value.startswith('"') and ", " not in value
    return (
        value if is_plain and value not in ("", *RESERVED) else json.dumps(value, ensure_ascii=not value.isprintable())
    )


class SliceNumbers:
    """The slices of one dimension, and the number of each row's.

    Args:
        dimension: whose. counts: of `count_values`. top: how many of the most frequent values are slices; of equally frequent
            ones the smaller. min_rows: that a slice must have.
    Attributes:
        names: of the slices, in the order of their numbers.
    """

    def __init__(self, dimension: Dimension, counts: pl.DataFrame, top: int, min_rows: int) -> None:
        self.dimension = dimension
        frequent = counts.filter(pl.col("rows") >= min_rows)
        if dimension.has_order:
            ordered, limit = frequent.sort("value", nulls_last=True), MAX_ORDERED
        else:
            ordered, limit = frequent.sort("rows", descending=True, maintain_order=True), top
        named = ((dimension.label(value), value) for value in ordered["value"])
        kept = list(islice(((label, value) for label, value in named if label is not None), limit))
        self.names = tuple(label for label, _ in kept)
        values = pl.Series([value for _, value in kept], dtype=counts["value"].dtype)
        parts = [values] if values.dtype != pl.Struct else values.struct.unnest().get_columns()
        self.lookups = [_Places(part.unique(maintain_order=True)) for part in parts]
        self.slice_V = np.full(
            [len(lookup.values) + 1 for lookup in self.lookups], NO_SLICE, np.int16
        )  # the last: another
        place = tuple(lookup.of(part.to_arrow()) for lookup, part in zip(self.lookups, parts, strict=True))
        self.slice_V[place] = np.arange(len(kept), dtype=np.int16)

    def of(self, table: pa.Table) -> np.ndarray:
        """Of N rows the number of their slice, or NO_SLICE."""
        values = self.dimension.values(table)
        parts = values.flatten() if pa.types.is_struct(values.type) else [values]
        return self.slice_V[tuple(lookup.of(part) for lookup, part in zip(self.lookups, parts, strict=True))]


class _Places:
    """The places of values among some; -1, which is the last place, for others."""

    def __init__(self, values: pl.Series) -> None:
        self.values = values
        # Integers that are close to each other are looked up in a table, which is several times as fast as a search.
        self.table_V: np.ndarray | None = None
        if values.dtype.is_integer() and len(values) and not values.has_nulls():
            value_V = values.to_numpy()
            self.first = int(value_V.min())
            if (span := int(value_V.max()) - self.first) < MAX_TABLE and abs(self.first) < 1 << 62:
                self.table_V = np.full(span + 3, -1)  # what is below the first and above the last has no place
                self.table_V[value_V.astype(np.int64) - self.first + 1] = np.arange(len(value_V))

    def of(self, values: pa.Array) -> np.ndarray:
        """Of N values the place."""
        if pa.types.is_dictionary(values.type):
            place_V = np.append(self.of(values.dictionary), self.of(pa.nulls(1, values.dictionary.type)))
            return place_V[values.indices.fill_null(len(place_V) - 1).to_numpy()]
        if self.table_V is not None and not values.null_count:
            offset_N = values.to_numpy().astype(np.int64) - (self.first - 1)
            return self.table_V[offset_N.clip(0, len(self.table_V) - 1)]
        place_N = pc.index_in(values, value_set=self.values.to_arrow().cast(values.type))
        return place_N.fill_null(-1).to_numpy()


def count_values(dimensions: Sequence[Dimension], tables: Iterable[pa.Table]) -> list[pl.DataFrame]:
    """Of each dimension its values and their rows, over tables that have the columns of all."""
    counts: list[list[pl.DataFrame]] = [[] for _ in dimensions]
    for table in tables:
        for dimension, parts in zip(dimensions, counts, strict=True):
            parts.append(_counted(dimension.values(table)))
            if len(parts) > 16:
                parts[:] = [_added_up(parts)]
    return [_added_up(parts) for parts in counts]


def _counted(values: pa.Array) -> pl.DataFrame:
    if not pa.types.is_struct(values.type):
        values, row_V = values.value_counts().flatten()
        return pl.DataFrame({"value": pl.from_arrow(_plain(values)), "rows": pl.from_arrow(row_V)})
    return pl.DataFrame({"value": pl.from_arrow(_plain(values))}).group_by("value").agg(rows=pl.len().cast(pl.Int64))


def _plain(values: pa.Array) -> pa.Array:
    """Texts instead of codes of them, which differ between row groups."""
    if pa.types.is_struct(values.type):
        return pa.StructArray.from_arrays(
            [_plain(part) for part in values.flatten()], [field.name for field in values.type]
        )
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _added_up(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    whole = pl.concat(parts).group_by("value").agg(pl.col("rows").sum()).sort("value")
    return whole.sort("rows", descending=True, maintain_order=True).head(MAX_VALUES).sort("value")
