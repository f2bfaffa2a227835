"""Encoders: fitted on the train split, saved as JSON and Parquet; they turn parsed rows into dataset columns."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import UserError
from features.fit.fitted_files import (
    NO_COUNTS,
    RESTORE_HINT,
    VERSION,
    Saved,
    check_vocabulary,
    read_content,
    vocabulary_file,
)
from features.fit.label_scale import LabelScale, scale_entry
from features.fit.vocabulary_index import VocabularyIndex
from features.hashing import hash_strings
from features.kinds.bins import bin_edges
from features.kinds.moments import Moments
from features.regular_files import mounted
from features.schema.schema import Schema

if TYPE_CHECKING:  # it needs datasketches, which encoding does not
    from features.fit.statistics import Statistics

MISSING, UNKNOWN = 0, 1  # the first ids of every table; tables of hash buckets and bins have no unknown values
FEW_TIMES = 8  # so many times the values that are encoded, a vocabulary is larger: then its index is the quicker way
UNKNOWN_SEED = 3  # of the hash that gives unknown values their ids; others than the buckets of hash tables


@dataclass(frozen=True)
class Encoders:
    """Fitted vocabularies and moments of a schema.

    Attributes:
        vocabularies: per table, its values in the order of their ids, which follow those of unknown values.
        moments: per dense feature, after its transform.
        edges: ascending edges of bins, of a piecewise number in the scale of the dataset's column, of a table in the raw one.
        missing: per dense feature, how many rows of the train split lacked it.
        counter_means: per smoothed counter, the mean over the train split that it is smoothed towards.
        labels: per regression task, the scale it is learnt in; a task that has none is learnt as it is.
        counts: per table with a vocabulary, int64, how often each value occurs in the train split that it was fitted on, over
            all rows and lists; empty where a dataset of before there were any does not say.
        kept_from, kept_tables: where a schema had grown, the encoders_id of those of which some were kept, and the tables whose
            ids mean what they meant there (see features.fit.reuse).
        indexes: of vocabularies, where few values are encoded at a time; empty: each block is compared with all of them.
    """

    schema: Schema
    vocabularies: Mapping[str, pa.Array]
    moments: dict[str, Moments]
    edges: dict[str, list[float]]
    missing: dict[str, int] = field(default_factory=dict)
    counter_means: dict[str, float] = field(default_factory=dict)
    labels: dict[str, LabelScale] = field(default_factory=dict)
    kept_from: str | None = None
    kept_tables: tuple[str, ...] = ()
    counts: Mapping[str, np.ndarray] = field(default_factory=dict)
    indexes: Mapping[str, VocabularyIndex] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, schema: Schema, statistics: "Statistics", counter_means: Mapping[str, float] | None = None
    ) -> "Encoders":
        """Chooses each vocabulary: the most frequent values first, ties by value, so that a refit is identical."""
        vocabularies, counts = {}, {}
        for name, table in schema.all_tables.items():
            if table.counted:
                values = statistics.table_values(schema, name)
                minimum = table.vocabulary.min_count if table.vocabulary else 1
                limit = table.vocabulary.max_size if table.vocabulary else None
                frequent = values.filter(pl.col("count") >= minimum).sort("count", "value", descending=[True, False])
                kept = frequent.head(limit or frequent.height)
                vocabularies[name] = kept["value"].to_arrow().cast(pa.large_string())
                counts[name] = kept["count"].to_numpy()
        edges = {
            name: bin_edges(numbers, table.bins).tolist()
            for name, table in schema.all_tables.items()
            if table.bins and (numbers := statistics.numbers.get(name)) is not None
        }
        for name, feature in schema.features.items():
            if feature.code_bins:
                edges[name] = feature.code_edges(name, statistics)
        missing = {name: statistics.missing[name] for name in statistics.moments}
        labels = {name: target.scale() for name, target in statistics.targets.items()}
        means = dict(counter_means or {})
        return cls(schema, vocabularies, statistics.moments, edges, missing, means, labels, counts=counts)

    def num_embeddings(self, table: str) -> int:
        """Rows of an embedding table: every id an encoder can give, 0 .. num_embeddings - 1.

        The ids of a managed table are hashes; the model gives them rows (models.managed).
        """
        settings = self.schema.all_tables[table]
        if settings.managed:
            return UNKNOWN + 1 + settings.managed.sets * settings.managed.ways
        if settings.bins:
            return len(self.edges[table]) + 1
        return settings.hash + 1 if settings.hash else self._first(table) + self._size(table)

    def _size(self, table: str) -> int:
        """How many values a vocabulary has."""
        found = self.vocabularies
        return found.sizes[table] if isinstance(found, Saved) else len(found[table])

    def _first(self, table: str) -> int:
        """The id of a vocabulary's first value."""
        vocabulary = self.schema.all_tables[table].vocabulary
        return UNKNOWN + (vocabulary.unknown if vocabulary else 1)

    def unknown_ids(self, table: str) -> range | None:
        """The ids of values outside a vocabulary; None for a table that has none."""
        return range(UNKNOWN, self._first(table)) if self.schema.all_tables[table].counted else None

    def save(self, folder: Path) -> None:
        """Writes vocabularies/TABLE.parquet and encoders.json below `folder`."""
        (folder / "vocabularies").mkdir(parents=True, exist_ok=not mounted(folder))
        for name, values in self.vocabularies.items():
            ids = pa.array(np.arange(len(values), dtype=np.int64) + self._first(name))
            columns = {"value": values, "id": ids}
            if len(count_V := self.counts.get(name, NO_COUNTS)) == len(values):
                columns["count"] = pa.array(count_V)
            table, path = pa.table(columns), folder / vocabulary_file(name)
            if mounted(path):
                pq.write_table(table, path)
            else:
                pq.write_table(table, sink := io.BytesIO())
                path.write_bytes(sink.getvalue())
        content = {
            "version": VERSION,
            "inputs": self.schema.inputs_fingerprint,
            "num_embeddings": {name: self.num_embeddings(name) for name in self.schema.all_tables},
            "moments": {
                name: {"count": m.count, "missing": self.missing.get(name, 0), **asdict(m), "std": m.std}
                for name, m in self.moments.items()
            },
        }
        content |= {"edges": self.edges} if self.edges else {}
        content |= {"counter_means": self.counter_means} if self.counter_means else {}
        content |= {"labels": {name: scale_entry(scale) for name, scale in self.labels.items()}} if self.labels else {}
        content |= {"kept": {"encoders": self.kept_from, "tables": self.kept_tables}} if self.kept_from else {}
        (folder / "encoders.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, schema: Schema) -> "Encoders":
        """Reads what `save` wrote.

        Raises:
            UserError: it is missing, damaged, of another version, or was fitted for other features.
        """
        found = cls.open(folder, schema)
        return replace(found, vocabularies=dict(found.vocabularies), counts=dict(found.counts))

    @classmethod
    def open(cls, folder: Path, schema: Schema) -> "Encoders":
        """As `load`, but the values of a vocabulary are read, and checked, when they are first used.

        A value takes 83 bytes of memory, and a rank that trains needs no more than their number.
        """
        content = read_content(folder, schema)
        moments = {name: Moments(m.count, m.mean, m.squares) for name, m in content.moments.items()}
        missing = {name: m.missing for name, m in content.moments.items()}
        labels = {n: LabelScale(e.mean, e.std, e.positive) for n, e in content.labels.items() if n in schema.tasks}
        encoders = cls(schema, {}, moments, content.edges, missing, content.counter_means, labels)
        if content.kept:
            encoders = replace(encoders, kept_from=content.kept.encoders, kept_tables=tuple(content.kept.tables))
        sizes = {}
        for name, count in content.num_embeddings.items():
            if schema.all_tables[name].counted:
                sizes[name] = count - encoders._first(name)
                check_vocabulary(folder, name, sizes[name])
            elif encoders.num_embeddings(name) != count:
                raise UserError(
                    f"{folder}/encoders.json: num_embeddings of {name} are {count:,}, the schema's are "
                    f"{encoders.num_embeddings(name):,}. {RESTORE_HINT}"
                )
        read: dict[str, tuple[pa.Array, np.ndarray]] = {}
        values, counts = (Saved(folder, sizes, read, counts) for counts in (False, True))
        return replace(encoders, vocabularies=values, counts=counts)

    def indexed(self) -> "Encoders":
        """The same encoders, which find the places of values in a vocabulary in a time that hardly depends on its size."""
        return replace(self, indexes={name: VocabularyIndex(values) for name, values in self.vocabularies.items()})

    def encode(self, rows: pa.Table) -> pa.Table:
        """Turns rows of `features.parse.raw.parse` into the columns of a dataset (see `arrow_schema`), in the same order."""
        columns: dict[str, pa.Array] = {}
        for name, feature in self.schema.features.items():
            columns |= feature.encode(name, rows[name].combine_chunks(), self)
        target = arrow_schema(self.schema)
        found = [columns[f.name] if f.name in columns else rows[f.name].combine_chunks() for f in target]
        return pa.Table.from_arrays([c.cast(f.type) for c, f in zip(found, target, strict=True)], schema=target)

    def bins(self, table: str, x_B: np.ndarray) -> np.ndarray:
        """Ids of float64 numbers in a table of bins, MISSING of NaN.

        Every edge starts a bin; what is smaller than the first is in the first.
        """
        bin_B = np.searchsorted(self._upper_edges[table], x_B, side="right") + 1
        return np.where(np.isnan(x_B), MISSING, bin_B).astype(np.int64)

    @cached_property
    def _upper_edges(self) -> dict[str, np.ndarray]:
        return {name: np.array(edges[1:]) for name, edges in self.edges.items()}

    def ids(self, table: str, codes: pa.DictionaryArray) -> pa.Array:
        """Ids of values in any other table: those of the distinct values of a block, then only of their codes row by row."""
        id_V = np.append(self._value_ids(table, codes.dictionary.cast(pa.large_string())), MISSING)
        return pa.array(id_V[codes.indices.fill_null(len(id_V) - 1).to_numpy()])

    def _value_ids(self, table: str, values: pa.Array) -> np.ndarray:
        if buckets := self.schema.all_tables[table].hash:
            return 1 + (hash_strings(values) % np.uint64(buckets)).astype(np.int64)
        if self.schema.all_tables[table].managed:
            return 1 + (hash_strings(values) % np.uint64((1 << 63) - 1)).astype(np.int64)
        first = self._first(table)
        vocabulary, index = self.vocabularies[table], self.indexes.get(table)
        few = FEW_TIMES * len(values) < len(vocabulary)
        id_V = index.places(values) if index and few else _places(vocabulary, values)
        ids = id_V + first
        if len(unknown := np.flatnonzero(id_V < 0)):
            bucket = hash_strings(values.take(pa.array(unknown)), UNKNOWN_SEED) % np.uint64(first - UNKNOWN)
            ids[unknown] = UNKNOWN + bucket.astype(np.int64)
        return ids


def _places(vocabulary: pa.Array, values: pa.Array) -> np.ndarray:
    """The place of each value in a vocabulary, -1 of those that it lacks."""
    if len(vocabulary) <= 2 * len(values):
        return pc.index_in(values, value_set=vocabulary).fill_null(-1).to_numpy().astype(np.int64)
    # index_in builds a hash table of its value_set: let it be the smaller side.
    distinct = values.unique()
    place = pc.index_in(vocabulary, value_set=distinct)
    id_D = np.full(len(distinct), -1, np.int64)
    id_D[place.drop_null().to_numpy()] = np.flatnonzero(place.is_valid().to_numpy(False))
    found: np.ndarray = id_D[pc.index_in(values, value_set=distinct).to_numpy()]
    return found


def arrow_schema(schema: Schema) -> pa.Schema:
    """Columns of a dataset's shards: features, labels (null = not observed), weight, event_time, row_id, and kept ones."""
    columns = schema.columns | {f"label.{task}": pa.float32() for task in schema.tasks}
    columns |= {"weight": pa.float32(), "event_time": pa.int64(), "row_id": pa.int64()}
    return pa.schema(columns | schema.kept)
