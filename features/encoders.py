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
from features.hashing import hash_strings
from features.raw import ROW_ID, WEIGHT
from features.schema import Schema
from features.statistics import Moments, Statistics, bag_elements, transformed

VERSION = 1
MISSING, UNKNOWN = 0, 1  # the first ids of every table; a hash table has no unknown values


@dataclass(frozen=True)
class Encoders:
    """Fitted vocabularies and moments of a schema.

    Attributes:
        vocabularies: per table, its values in the order of their ids, the first of which is UNKNOWN + 1.
        moments: per dense feature.
    """

    schema: Schema
    vocabularies: dict[str, pa.Array]
    moments: dict[str, Moments]

    @classmethod
    def fit(cls, schema: Schema, statistics: Statistics) -> "Encoders":
        """Chooses each vocabulary: the most frequent values first, ties by value, so that a refit is identical."""
        vocabularies = {}
        for name, table in schema.all_tables.items():
            if table.hash is None and (counts := statistics.values.get(name)) is not None:
                minimum = table.vocabulary.min_count if table.vocabulary else 1
                limit = table.vocabulary.max_size if table.vocabulary else None
                kept = counts.filter(pl.col("count") >= minimum).sort("count", "value", descending=[True, False])
                vocabularies[name] = kept.head(limit or kept.height)["value"].to_arrow().cast(pa.large_string())
        return cls(schema, vocabularies, statistics.moments)

    def num_embeddings(self, table: str) -> int:
        """Rows of an embedding table: every id an encoder can give, 0 .. num_embeddings - 1."""
        buckets = self.schema.all_tables[table].hash
        return buckets + 1 if buckets else len(self.vocabularies[table]) + 2

    def save(self, folder: Path) -> None:
        """Writes vocabularies/TABLE.parquet and encoders.json below `folder`."""
        (folder / "vocabularies").mkdir(parents=True)
        for name, values in self.vocabularies.items():
            ids = pa.array(np.arange(len(values), dtype=np.int64) + UNKNOWN + 1)
            pq.write_table(pa.table({"value": values, "id": ids}), folder / "vocabularies" / f"{name}.parquet")
        content = {
            "version": VERSION,
            "fingerprint": self.schema.fingerprint,
            "num_embeddings": {name: self.num_embeddings(name) for name in self.schema.all_tables},
            "moments": {name: asdict(m) | {"std": m.std} for name, m in self.moments.items()},
        }
        (folder / "encoders.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, schema: Schema) -> "Encoders":
        """Reads what `save` wrote.

        Raises:
            UserError: it is missing, of another version, or was fitted for another schema.
        """
        try:
            content = json.loads((folder / "encoders.json").read_text())
            vocabularies = {
                path.stem: pq.read_table(path)["value"].combine_chunks().cast(pa.large_string())
                for path in (folder / "vocabularies").glob("*.parquet")
            }
            known = {name: content[name] for name in ("version", "fingerprint", "num_embeddings", "moments")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: encoders cannot be read ({error}). Run jobs.preprocess again.") from None
        if known["version"] != VERSION:
            raise UserError(f"{folder}: encoders of version {known['version']}, this release reads {VERSION}")
        if known["fingerprint"] != schema.fingerprint:
            raise UserError(
                f"{folder}: encoders were fitted for schema {known['fingerprint']}, this is {schema.fingerprint}. "
                "Use the schema of that dataset, or fit new encoders."
            )
        for name, count in known["num_embeddings"].items():
            if schema.all_tables[name].hash is None and len(vocabularies.get(name, [])) + UNKNOWN + 1 != count:
                raise UserError(
                    f"{folder}/vocabularies/{name}.parquet is missing, or does not hold the {count - UNKNOWN - 1} values "
                    "that were fitted. Restore it, or run jobs.preprocess again."
                )
        moments = {n: Moments(**{k: v for k, v in m.items() if k != "std"}) for n, m in known["moments"].items()}
        return cls(schema, vocabularies, moments)

    def encode(self, rows: pl.DataFrame) -> pa.Table:
        """Turns parsed rows into the columns of a dataset (see `arrow_schema`), row by row in the same order."""
        columns: dict[str, pa.Array] = {}
        for name in self.schema.dense:
            columns |= self._dense(name, rows)
        for name, feature in self.schema.sparse.items():
            text = rows[feature.column or name].cast(pl.String)
            columns[name] = self._bag(name, text) if name in self.schema.bag else self._ids(name, text.to_arrow())
        for task in self.schema.tasks:
            columns[f"label.{task}"] = rows[f"label.{task}"].to_arrow()
        columns["weight"] = rows[WEIGHT].to_arrow()
        time = self.schema.event_time
        columns["event_time"] = rows[time].to_arrow() if time else pa.array(np.zeros(rows.height, np.int64))
        columns["row_id"] = rows[ROW_ID].to_arrow()
        target = arrow_schema(self.schema)
        return pa.Table.from_arrays([columns[field.name].cast(field.type) for field in target], schema=target)

    def _dense(self, name: str, rows: pl.DataFrame) -> dict[str, pa.Array]:
        feature, moments = self.schema.dense[name], self.moments[name]
        x_B = transformed(feature, rows[feature.column or name].cast(pl.Float64).to_numpy())
        missing_B = np.isnan(x_B)
        x_B = np.where(missing_B, moments.mean, x_B)
        if feature.standardize:
            # A constant column carries nothing: it becomes 0 instead of a division by 0.
            x_B = (x_B - moments.mean) / moments.std if moments.std > 0 else np.zeros_like(x_B)
        columns = {name: pa.array(x_B.astype(np.float32))}
        return columns | ({f"{name}_missing": pa.array(missing_B.astype(np.float32))} if feature.missing_flag else {})

    def _ids(self, name: str, text: pa.Array) -> pa.Array:
        table = self.schema.table_of(name)
        buckets = self.schema.all_tables[table].hash
        if buckets:
            ids = np.where(
                text.is_valid().to_numpy(False), 1 + (hash_strings(text) % np.uint64(buckets)).astype(np.int64), MISSING
            )
            return pa.array(ids)
        values = self.vocabularies[table]
        known = pc.index_in(text.cast(values.type), value_set=values, skip_nulls=True).to_numpy(zero_copy_only=False)
        known = np.where(np.isnan(known), UNKNOWN, known + UNKNOWN + 1).astype(np.int64)
        return pa.array(np.where(text.is_valid().to_numpy(False), known, MISSING))

    def _bag(self, name: str, text: pl.Series) -> pa.Array:
        lists = bag_elements(self.schema, name, text).to_arrow().cast(pa.large_list(pa.large_string()))
        return pa.LargeListArray.from_arrays(lists.offsets, self._ids(name, lists.values))


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
