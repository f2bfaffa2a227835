"""What bench-serve scores: Census-Income, adatt trained on it, packages of it, rows in every form that contenders take."""

# Shapes: B rows, N rows of a split, F id columns, D dense columns, T tasks.

import csv
import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from serving_contenders import Columns
from train_runs import run

from features.batch import Batch, Rows
from features.fit.encoders import arrow_schema
from features.parse import raw
from features.schema.schema import Schema
from features.schema.unlabelled import without_labels
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.evaluation.weights import ModelWeights
from pipeline.overrides import setting
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.serving.encoded import Encoded, encoded

FORMATS = ("fp32", "fp16", "int8", "int4")
MAX_ROWS = 8192  # of a request


@dataclass(frozen=True)
class Workload:
    """A dataset, a run of adatt on it, and where packages of it lie."""

    folder: Path
    data: Path
    trained: Path

    @cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.data)

    @cached_property
    def run(self) -> Run:
        return Run(self.trained)

    @property
    def step(self) -> int:
        return checkpoint.steps(self.run.checkpoints)[-1]

    @cached_property
    def without_labels(self) -> Schema:
        return without_labels(self.dataset.schema)

    def package(self, form: str) -> Path:
        """A package with both programs, exported when it is first asked for."""
        out = self.folder / f"package-{form}"
        if not (out / "manifest.json").exists():
            run_here(
                ["-m", "jobs.export", setting("run", self.trained), setting("out", out), f"tables={form}", "target=aot"]
            )
        return out

    @cached_property
    def weights(self) -> ModelWeights:
        """The checkpoint as evaluation loads it."""
        weights = ModelWeights(self.run, self.dataset, ["test"], MAX_ROWS)
        weights.load(self.step)
        return weights

    def split(self, name: str) -> pa.Table:
        """The encoded rows of a split."""
        shards = [self.data / shard.path for shard in self.dataset.shards(name)]
        return pa.concat_tables([pq.read_table(shard) for shard in shards])

    @cached_property
    def test(self) -> pa.Table:
        return self.split("test")

    @cached_property
    def raw_rows(self) -> list[dict[str, Any]]:
        """The rows of `test` as a client sends them: numbers as numbers, missing ones as null, no column of a label."""
        source, wanted = self.dataset.schema.source, set(self.without_labels.raw_columns)
        types = self.without_labels.raw_types
        kinds = {name: types.get(name, "string") for name in wanted}
        data = Path(os.environ.get("TASKFUSE_DATA", "../shared/data")) / str(source.files)
        with gzip.open(data, "rt") as lines:
            cells = list(csv.reader(lines, skipinitialspace=True))
        return [
            {n: _value(v.strip(), kinds[n]) for n, v in zip(source.columns, cells[line], strict=True) if n in wanted}
            for line in self.test["row_id"].to_pylist()
        ]

    def arrow(self, start: int, rows: int) -> pa.Table:
        """The same as the log has them: text."""
        taken = self.raw_rows[start : start + rows]
        return pa.table(
            {n: pa.array([_text(row[n]) for row in taken], pa.string()) for n in self.without_labels.raw_columns}
        )

    def columns(self, start: int, rows: int, table: pa.Table | None = None) -> Columns:
        """Encoded rows as the contenders take them."""
        table = self.test if table is None else table
        found = self.encoded(start, rows, table)
        labels = [table[f"label.{task}"].slice(start, rows).to_numpy() for task in self.dataset.schema.tasks]
        return Columns(found.id_BF.numpy(), found.dense_BD.numpy(), np.stack(labels, 1).astype(np.float32))

    def encoded(self, start: int, rows: int, table: pa.Table | None = None) -> Encoded:
        """As a package takes them."""
        table = self.test if table is None else table
        return encoded(table.slice(start, rows), self.dataset.schema)

    def batch(self, start: int, rows: int) -> Batch:
        """As the ranker takes them."""
        return Rows.decode(self.test.slice(start, rows).combine_chunks(), self.dataset.schema).batch(
            self.dataset.schema, rows
        )

    def slow_path(self) -> Callable[[list[dict[str, Any]]], torch.Tensor]:
        """From dictionaries to logits by what preprocessing and evaluation are made of, without a package."""
        schema, encoders, weights = self.without_labels, self.dataset.encoders, self.weights
        types = {name: schema.raw_types.get(name, "string") for name in schema.raw_columns}
        codes = raw.code_columns(schema)

        def score(rows: list[dict[str, Any]]) -> torch.Tensor:
            table = pa.table({n: pa.array([_text(row[n]) for row in rows], pa.string()) for n in schema.raw_columns})
            typed = raw.type_columns(table, types, codes, schema.source, np.arange(len(rows)), 0)
            found = encoders.encode(raw.parse(schema, typed.rows, 0).rows)
            return weights(Rows.decode(found.select(arrow_schema(schema).names), schema).batch(schema, len(rows)))

        return score

    def table_sizes(self) -> tuple[list[int], list[int]]:
        """Rows and width of the table of each feature of one id."""
        schema, encoders = self.dataset.schema, self.dataset.encoders
        tables = [schema.table_of(name) for name in schema.single]
        return [encoders.num_embeddings(table) for table in tables], [schema.all_tables[table].dim for table in tables]


def prepare(folder: Path, epochs: int, data: Path | None = None, trained: Path | None = None) -> Workload:
    """Makes what is not in the folder yet: the dataset and the run, unless they are given."""
    data, trained = data or folder / "data", trained or folder / "run"
    if not (data / "manifest.json").exists():
        run_here(["-m", "jobs.preprocess", "data=census", setting("out", data)])
    if not (trained / "checkpoints").exists():
        chosen = ["model=adatt", "recipe=census", f"train.epochs={epochs}", "train.threads=1"]
        run_here(["-m", "jobs.train", setting("dataset", data), setting("run", trained), *chosen])
    return Workload(folder, data, trained)


def run_here(arguments: list[str]) -> str:
    """A job, with this process's modules."""
    return run(arguments, path=os.environ.get("PYTHONPATH", ""))


def _value(text: str, kind: str) -> Any:
    if text in ("", "?"):
        return None
    return json.loads(text) if kind in ("int", "float") else text


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
