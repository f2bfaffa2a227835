"""Encoders: what was fitted on the train split, saved readable, and how it turns parsed rows into dataset columns."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import UserError
from features.fit.statistics import Moments, Statistics, transformed
from features.hashing import hash_strings
from features.schema.kinds import Dense
from features.schema.schema import Schema

VERSION = 3
MISSING, UNKNOWN = 0, 1  # the first ids of every table; one of hash buckets or bins has no unknown values
UNKNOWN_SEED = 3  # deals unknown values to their ids, apart from the buckets of hash tables


@dataclass(frozen=True)
class Encoders:
    """Fitted vocabularies and moments of a schema.

    Attributes:
        vocabularies: per table, its values in the order of their ids, which follow those of unknown values.
        moments: per dense feature.
        edges: ascending edges of bins, of a piecewise number in the scale of the dataset's column, of a table in the raw one.
    """

    schema: Schema
    vocabularies: dict[str, pa.Array]
    moments: dict[str, Moments]
    edges: dict[str, list[float]]

    @classmethod
    def fit(cls, schema: Schema, statistics: Statistics) -> "Encoders":
        """Chooses each vocabulary: the most frequent values first, ties by value, so that a refit is identical."""
        vocabularies = {}
        for name, table in schema.all_tables.items():
            if table.counted:
                counts = statistics.table_values(schema, name)
                minimum = table.vocabulary.min_count if table.vocabulary else 1
                limit = table.vocabulary.max_size if table.vocabulary else None
                kept = counts.filter(pl.col("count") >= minimum).sort("count", "value", descending=[True, False])
                vocabularies[name] = kept.head(limit or kept.height)["value"].to_arrow().cast(pa.large_string())
        edges = {
            name: bin_edges(numbers, table.bins).tolist()
            for name, table in schema.all_tables.items()
            if table.bins and (numbers := statistics.numbers.get(name)) is not None
        }
        for name, feature in schema.dense.items():
            if feature.piecewise:
                found = bin_edges(statistics.numbers[name], feature.piecewise)
                edges[name] = _distinct(_scaled(feature, statistics.moments[name], found))
        return cls(schema, vocabularies, statistics.moments, edges)

    def num_embeddings(self, table: str) -> int:
        """Rows of an embedding table: every id an encoder can give, 0 .. num_embeddings - 1.

        The ids of a managed table are hashes; the model gives them rows (models.managed).
        """
        settings = self.schema.all_tables[table]
        if settings.managed:
            return UNKNOWN + 1 + settings.managed.sets * settings.managed.ways
        if settings.bins:
            return len(self.edges[table]) + 1
        return settings.hash + 1 if settings.hash else self._first(table) + len(self.vocabularies[table])

    def _first(self, table: str) -> int:
        """The id of a vocabulary's first value."""
        vocabulary = self.schema.all_tables[table].vocabulary
        return UNKNOWN + (vocabulary.unknown if vocabulary else 1)

    def save(self, folder: Path) -> None:
        """Writes vocabularies/TABLE.parquet and encoders.json below `folder`."""
        (folder / "vocabularies").mkdir(parents=True)
        for name, values in self.vocabularies.items():
            ids = pa.array(np.arange(len(values), dtype=np.int64) + self._first(name))
            pq.write_table(pa.table({"value": values, "id": ids}), folder / "vocabularies" / f"{name}.parquet")
        content = {
            "version": VERSION,
            "inputs": self.schema.inputs_fingerprint,
            "num_embeddings": {name: self.num_embeddings(name) for name in self.schema.all_tables},
            "moments": {name: asdict(m) | {"std": m.std} for name, m in self.moments.items()},
        }
        content |= {"edges": self.edges} if self.edges else {}
        (folder / "encoders.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, schema: Schema) -> "Encoders":
        """Reads what `save` wrote.

        Raises:
            UserError: it is missing, of another version, or was fitted for other features.
        """
        try:
            content = json.loads((folder / "encoders.json").read_text())
            vocabularies = {
                path.stem: pq.read_table(path)["value"].combine_chunks().cast(pa.large_string())
                for path in (folder / "vocabularies").glob("*.parquet")
            }
            known = {name: content[name] for name in ("version", "inputs", "num_embeddings", "moments")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: encoders cannot be read ({error}). Run jobs.preprocess again.") from None
        if known["version"] != VERSION:
            raise UserError(f"{folder}: encoders of version {known['version']}, this release reads {VERSION}")
        if known["inputs"] != schema.inputs_fingerprint:
            raise UserError(
                f"{folder}: encoders were fitted for features {known['inputs']}, this schema has "
                f"{schema.inputs_fingerprint}. Use the features of that dataset, or fit new encoders."
            )
        moments = {n: Moments(**{k: v for k, v in m.items() if k != "std"}) for n, m in known["moments"].items()}
        encoders = cls(schema, vocabularies, moments, content.get("edges", {}))
        for name, count in known["num_embeddings"].items():
            if schema.all_tables[name].counted and (name not in vocabularies or encoders.num_embeddings(name) != count):
                raise UserError(
                    f"{folder}/vocabularies/{name}.parquet is missing, or does not hold the "
                    f"{count - encoders._first(name)} values that were fitted. Restore it, or run jobs.preprocess again."
                )
        return encoders

    def encode(self, rows: pa.Table) -> pa.Table:
        """Turns rows of `features.raw.parse` into the columns of a dataset (see `arrow_schema`), in the same order."""
        columns: dict[str, pa.Array] = {}
        for name in self.schema.dense:
            columns |= self._dense(name, _numbers(rows[name]))
        for name in self.schema.sparse:
            values = rows[name].combine_chunks()
            if (table := self.schema.table_of(name)) in self.edges:
                columns[name] = self._bins(table, _numbers(values))
            elif name in self.schema.bag:
                columns[name] = pa.LargeListArray.from_arrays(values.offsets, self._ids(name, values.values))
            else:
                columns[name] = self._ids(name, values)
        target = arrow_schema(self.schema)
        found = [columns[f.name] if f.name in columns else rows[f.name].combine_chunks() for f in target]
        return pa.Table.from_arrays([c.cast(f.type) for c, f in zip(found, target, strict=True)], schema=target)

    def _dense(self, name: str, raw_B: np.ndarray) -> dict[str, pa.Array]:
        feature, moments = self.schema.dense[name], self.moments[name]
        x_B = transformed(feature, raw_B)
        missing_B = np.isnan(x_B)
        if missing_B.any():
            x_B = np.where(missing_B, moments.mean, x_B)
        columns = {name: pa.array(_scaled(feature, moments, x_B).astype(np.float32))}
        return columns | ({f"{name}_missing": pa.array(missing_B.astype(np.float32))} if feature.missing_flag else {})

    def _bins(self, table: str, x_B: np.ndarray) -> pa.Array:
        """Every edge starts a bin; what is smaller than the first is in the first."""
        bin_B = np.searchsorted(np.array(self.edges[table][1:]), x_B, side="right") + 1
        return pa.array(np.where(np.isnan(x_B), MISSING, bin_B).astype(np.int64))

    def _ids(self, name: str, codes: pa.DictionaryArray) -> pa.Array:
        """Looks the distinct values of a block up, and then only their codes row by row."""
        table = self.schema.table_of(name)
        id_V = np.append(self._value_ids(table, codes.dictionary.cast(pa.large_string())), MISSING)
        return pa.array(id_V[codes.indices.fill_null(len(id_V) - 1).to_numpy()])

    def _value_ids(self, table: str, values: pa.Array) -> np.ndarray:
        if buckets := self.schema.all_tables[table].hash:
            return 1 + (hash_strings(values) % np.uint64(buckets)).astype(np.int64)
        if self.schema.all_tables[table].managed:
            return 1 + (hash_strings(values) % np.uint64((1 << 63) - 1)).astype(np.int64)
        vocabulary, first = self.vocabularies[table], self._first(table)
        if len(vocabulary) > 2 * len(values):  # the hash table that index_in builds had better be of the fewer
            distinct = values.unique()
            place = pc.index_in(vocabulary, value_set=distinct)
            id_D = np.full(len(distinct), -1, np.int64)
            id_D[place.drop_null().to_numpy()] = np.flatnonzero(place.is_valid().to_numpy(False))
            id_V = id_D[pc.index_in(values, value_set=distinct).to_numpy()]
        else:
            id_V = pc.index_in(values, value_set=vocabulary).fill_null(-1).to_numpy().astype(np.int64)
        ids = id_V + first
        if len(unknown := np.flatnonzero(id_V < 0)):
            dealt = hash_strings(values.take(pa.array(unknown)), UNKNOWN_SEED) % np.uint64(first - UNKNOWN)
            ids[unknown] = UNKNOWN + dealt.astype(np.int64)
        return ids


def _numbers(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64, NaN where a value is missing."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return array.to_numpy(zero_copy_only=False)


def _scaled(feature: Dense, moments: Moments, values: np.ndarray) -> np.ndarray:
    """Transformed values as the dataset holds them."""
    if not feature.standardize:
        return values
    # A constant column carries nothing: it becomes 0 instead of a division by 0.
    return (values - moments.mean) / moments.std if moments.std > 0 else np.zeros_like(values)


def _distinct(edges: np.ndarray) -> list[float]:
    """Edges in float32, as a dataset's column is: there some may be one and the same, and of a constant all are."""
    kept = np.unique(edges.astype(np.float32)).tolist()
    return kept if len(kept) > 1 else [kept[0], kept[0] + max(1.0, abs(kept[0]))]


def bin_edges(counts: pl.DataFrame, bins: int) -> np.ndarray:
    """Ascending edges of about `bins` bins of equal mass, the first and last being the smallest and largest value.

    A value that alone outweighs a bin gets edges of its own and leaves the others to the rest: quantiles of a number that is
    0 in nine rows of ten would be one and the same.

    Args:
        counts: frame (value, count), in any order.
    """
    counts = counts.sort("value")
    value_V, count_V = counts["value"].to_numpy(), counts["count"].to_numpy().astype(np.float64)
    if len(value_V) < 2:  # a column without two values tells nothing, but has an edge on either side
        start = value_V[0] if len(value_V) else 0.0
        return np.array([start, start + max(1.0, abs(start))])
    if len(value_V) <= bins + 1:
        return value_V
    heavy_V = np.zeros(len(value_V), dtype=bool)
    while True:
        left = bins + 1 - heavy_V.sum()
        more_V = ~heavy_V & (count_V * left > count_V[~heavy_V].sum())
        if left <= 2 or not more_V.any():
            break
        heavy_V |= more_V
    own = np.flatnonzero(heavy_V[:-1])
    light_V = np.where(heavy_V, 0.0, count_V).cumsum()
    wanted = np.linspace(0, light_V[-1], max(left, 2))
    chosen = np.minimum(np.searchsorted(light_V, wanted), len(value_V) - 1)
    return value_V[np.unique(np.concatenate([chosen, own, own + 1, [0, len(value_V) - 1]]))]


def arrow_schema(schema: Schema) -> pa.Schema:
    """Columns of a dataset's shards: dense, ids, bags, labels (null = not observed), weight, event_time, row_id."""
    kinds = [
        (schema.dense_columns, pa.float32()),
        (list(schema.categorical), pa.int64()),
        (list(schema.bag), pa.list_(pa.int64())),
        ([f"label.{task}" for task in schema.tasks], pa.float32()),
    ]
    fields = [pa.field(name, kind) for names, kind in kinds for name in names]
    fields += [pa.field("weight", pa.float32()), pa.field("event_time", pa.int64()), pa.field("row_id", pa.int64())]
    return pa.schema(fields)
