"""Datasets that tests write from rows of their own, without a job."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.parse import raw
from features.schema.schema import Schema, Split
from pipeline.dataset.dataset import Dataset, commit
from pipeline.ingest.steps.write import write_shard

NOTHING_ELSE: dict[str, Any] = {"read": {}, "left_out": {}, "outcomes": {}, "dead_letters": {}, "letters": []}


def parse_text(schema: Schema, text: pl.DataFrame) -> pa.Table:
    """Rows of text as features and labels."""
    types = {name: schema.raw_types.get(name, "string") for name in schema.raw_columns}
    lines = np.arange(text.height) + 2
    typed = raw.type_columns(text.to_arrow(), types, raw.code_columns(schema), schema.source, lines, 0)
    return raw.parse(schema, typed.rows, 0).rows


def write_dataset(
    out: Path, schema: Schema, splits: dict[Split, pa.Table], row_group: int, shard_rows: int, encoders: Any = None
) -> Dataset:
    """Commits encoded rows as they are, in shards of `shard_rows`."""
    staging = out.with_name(f"{out.name}.staging")
    (staging / "scratch").mkdir(parents=True)
    if encoders is not None:
        encoders.save(staging / "encoders")
    shards = [
        write_shard(
            staging / "scratch" / f"{split}-{at}", staging, split, schema, [rows.slice(at, shard_rows)], row_group
        )
        for split, rows in splits.items()
        for at in range(0, rows.num_rows, shard_rows)
    ]
    commit(staging, out, schema, shards, NOTHING_ELSE)
    return Dataset(out)
