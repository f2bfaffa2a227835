"""Slices of a split: by the values of kept columns and features, by ranges, by SQL, by crosses, by cold start and by time.

The slices of a dimension are found in one reading of its columns before the first checkpoint is scored; from then on each row
group's rows get the number of their slice while it is decoded.
"""

# Shapes: N rows, V values of a dimension, S slices of it.

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError, did_you_mean
from features.fit.encoders import MISSING
from features.parse.compute import evaluate
from features.schema.expressions import columns_of
from features.schema.kept import kept_column
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.shards import with_plain_texts
from pipeline.evaluation.metrics.settings import Edges, MeasureConfig, Sql

NO_SLICE = -1
MAX_VALUES = 1 << 20  # of a dimension, of which the most frequent are slices
DAY = 86_400


class Dimension:
    """One way to divide the rows.

    Attributes:
        name: as in `Evaluated.figures`. columns: of the dataset that it needs.
    """

    name: str
    columns: Sequence[str]

    @abstractmethod
    def values(self, table: pa.Table) -> pa.Array:
        """Of N rows the value, of any type; null: missing."""

    def label(self, value: object) -> str | None:
        """The slice's name; None where the value is no slice."""
        return f"{self.name}={'missing' if value is None else value}"


class _Column(Dimension):
    """The values of a kept column."""

    def __init__(self, name: str, column: str) -> None:
        self.name, self.columns = name, [column]

    def values(self, table: pa.Table) -> pa.Array:
        values = table[self.columns[0]].combine_chunks()
        # A row group whose texts repeat is read as codes; the values looked up are texts.
        return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


class _Feature(Dimension):
    """The values of a categorical feature with a vocabulary, by their ids."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self.name, self.columns = name, [name]
        table = dataset.schema.table_of(name)
        unknown = dataset.encoders.unknown_ids(table)
        assert unknown is not None
        self.unknown, self.vocabulary = unknown, dataset.encoders.vocabularies[table]

    def values(self, table: pa.Table) -> pa.Array:
        id_N = table[self.name].combine_chunks()
        return pc.if_else(pc.is_in(id_N, value_set=pa.array(list(self.unknown), id_N.type)), self.unknown.start, id_N)

    def label(self, value: object) -> str | None:
        assert isinstance(value, int)
        if value in (MISSING, self.unknown.start):
            return f"{self.name}={'missing' if value == MISSING else 'unseen'}"
        return f"{self.name}={self.vocabulary[value - self.unknown.stop].as_py()}"


class _Edges(Dimension):
    """Ranges of a number, of a kept column in its unit or a dense feature by edges in the feature's scale."""

    def __init__(self, settings: Edges, dataset: Dataset) -> None:
        self.name, self.edges = settings.column, settings.edges
        schema = dataset.schema
        if settings.column in schema.keep:
            self.columns = [kept_column(settings.column)]
            self.cut_V = np.array(settings.edges, np.float64)
            return
        if settings.column not in schema.dense:
            raise UserError(_unknown(settings.column, dataset, "a number"))
        self.columns = [settings.column]
        encoded = schema.dense[settings.column].encode(
            settings.column, pa.array(settings.edges, pa.float64()), dataset.encoders
        )
        self.cut_V = encoded[settings.column].to_numpy().astype(np.float64)

    def values(self, table: pa.Table) -> pa.Array:
        value_N = table[self.columns[0]].combine_chunks().cast(pa.float64())
        place_N = np.searchsorted(self.cut_V, value_N.fill_null(np.nan).to_numpy(), side="right")
        return pa.array(place_N, mask=~value_N.is_valid().to_numpy(False))

    def label(self, value: object) -> str | None:
        if not isinstance(value, int):
            return f"{self.name} missing"
        edges = [f"{edge:g}" for edge in self.edges]
        if value == 0:
            return f"{self.name} below {edges[0]}"
        return (
            f"{self.name} {edges[value - 1]}..{edges[value]}" if value < len(edges) else f"{self.name} from {edges[-1]}"
        )


class _Sql(Dimension):
    """The rows for which a condition over kept columns holds."""

    def __init__(self, settings: Sql, dataset: Dataset) -> None:
        self.name = self.sql = settings.sql
        names = list(dict.fromkeys(columns_of(settings.sql)))
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
            raise UserError(f"slices: sql: {self.sql!r} is {found.dtype}, a condition is needed, such as position <= 3")
        return found.fill_null(False).to_arrow()

    def label(self, value: object) -> str | None:
        return self.sql if value else None


class _ColdStart(Dimension):
    """Ids of a feature that training has not seen, or rarely, or that are missing."""

    STATES = ("seen", "missing", "unseen", "rare")

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

    def __init__(self, name: str) -> None:
        self.name, self.columns = name, ["event_time"]

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
        return f"day={datetime.fromtimestamp(value * DAY, timezone.utc):%Y-%m-%d}"


class _Cross(Dimension):
    """Pairs, or longer, of the values of others."""

    def __init__(self, parts: Sequence[Dimension]) -> None:
        self.parts = parts
        self.name = ", ".join(part.name for part in parts)
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
    if schema.event_time:
        found += [_Time(name) for name in config.by_time]
    if twice := {d.name for d in found if [x.name for x in found].count(d.name) > 1}:
        raise UserError(f"slices: {min(twice)} is named twice")
    return found


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


class SliceNumbers:
    """The slices of one dimension, found by counting, and the number of each row's.

    Args:
        dimension: whose. tables: all rows of the split, its columns at least. top: how many of the most frequent values are
            slices. min_rows: that a slice must have.
    """

    def __init__(self, dimension: Dimension, counts: pl.DataFrame, top: int, min_rows: int) -> None:
        self.dimension = dimension
        ordered = counts.filter(pl.col("rows") >= min_rows).sort("rows", descending=True, maintain_order=True)
        named = [(dimension.label(value), value) for value in ordered["value"].to_list()]
        kept = [(label, value) for label, value in named if label is not None][:top]
        if isinstance(dimension, (_Edges, _Time)):
            kept.sort(key=lambda pair: pair[0] if pair[1] is None else f"{pair[1]:020d}")
        self.names = tuple(label for label, _ in kept)
        value_type = counts["value"].dtype
        self.lookup = pl.DataFrame(
            {"value": pl.Series([v for _, v in kept], dtype=value_type), "slice": np.arange(len(kept), dtype=np.int16)}
        )

    def of(self, table: pa.Table) -> np.ndarray:
        """Of N rows the number of their slice, or NO_SLICE."""
        values = self.dimension.values(table)
        if isinstance(values, pa.StructArray):
            frame = pl.DataFrame({"value": pl.from_arrow(_plain(values))})
            found = frame.join(self.lookup, on="value", how="left", nulls_equal=True, maintain_order="left")["slice"]
            return found.fill_null(NO_SLICE).to_numpy()
        if pa.types.is_dictionary(values.type):
            place_V = np.append(self._places(values.dictionary), self._places(pa.nulls(1, values.dictionary.type)))
            return place_V[values.indices.fill_null(len(place_V) - 1).to_numpy()]
        return self._places(values)

    def _places(self, values: pa.Array) -> np.ndarray:
        place_N = pc.index_in(values, value_set=self.lookup["value"].to_arrow().cast(values.type))
        return place_N.fill_null(NO_SLICE).to_numpy().astype(np.int16)


def count_values(dimensions: Sequence[Dimension], tables: Iterable[pa.Table]) -> list[pl.DataFrame]:
    """Of each dimension its values and their rows, over tables that have the columns of all."""
    counts: list[list[pl.DataFrame]] = [[] for _ in dimensions]
    for table in tables:
        for dimension, parts in zip(dimensions, counts, strict=True):
            values = pl.from_arrow(_plain(dimension.values(table)))
            assert isinstance(values, pl.Series)
            parts.append(values.alias("value").to_frame().group_by("value").len("rows"))
            if len(parts) > 16:
                parts[:] = [_added_up(parts)]
    return [_added_up(parts) for parts in counts]


def _plain(values: pa.Array) -> pa.Array:
    """Texts instead of codes of them, which differ between row groups."""
    if pa.types.is_struct(values.type):
        return pa.StructArray.from_arrays(
            [_plain(part) for part in values.flatten()], [field.name for field in values.type]
        )
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _added_up(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    whole = pl.concat(parts).group_by("value").agg(pl.col("rows").sum()).sort("value")
    return whole if whole.height <= MAX_VALUES else whole.top_k(MAX_VALUES, by="rows").sort("value")
