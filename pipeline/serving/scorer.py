"""A package in memory: rows in, predictions of each task out."""

# Shapes: B rows, T tasks, E numbers of all embeddings of a row, D dense columns.

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.fitted_files import encoder_files
from features.schema.schema import Schema
from pipeline.serving.deltas import check_base
from pipeline.serving.encoded import Encoded
from pipeline.serving.fetching import fetched_all, located
from pipeline.serving.given import Rows
from pipeline.serving.manifest import ENCODERS, HINT, SCHEMA, Manifest, check_files, read_manifest
from pipeline.serving.program import load_program
from pipeline.serving.requests import Requests
from pipeline.serving.tables import Tables

# What is scored at once, so that embeddings and activations stay within some tens of MB:
CHUNK = 8192  # rows,
NUMBERS = 1 << 25  # numbers of their embeddings,
ITEMS = 1 << 19  # and ids of lists


@dataclass(frozen=True)
class Scorer:
    """The model of a package. Every method may be called by several threads at a time.

    Attributes:
        manifest: of the package, of a delta that of the package it makes; `manifest.model` says which checkpoint it is.
        requests, tables, program: its parts: rows to ids and numbers, ids to embeddings, both to logits.
    """

    manifest: Manifest
    requests: Requests
    tables: Tables
    program: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def load(
        cls,
        path: Path | str,
        compiled: bool = False,
        check: bool = True,
        warm_up: int = 512,
        base: Path | str | Sequence[Path | str] | None = None,
    ) -> "Scorer":
        """Opens a package.

        Args:
            path: its folder, or the URL of one on a store (pipeline.serving.fetching).
            compiled: run its compiled program, which is code of this machine; False: the portable one.
            check: compare every file's checksum; False: of a package that was checked before, on this machine.
            warm_up: rows of a first answer, whose predictions must be finite; 0: none.
            base: the whole package that a delta changes, or that one and the deltas in between; None for a whole package.
        Raises:
            UserError: a package that is missing, damaged, of another version, or does not fit together; another base.
        """
        bases = [base] if isinstance(base, (Path, str)) else base or []
        *bases_here, here = fetched_all([located(each) for each in (*bases, path)])
        sources = _sources(here, bases_here)
        (folder, manifest), (whole, whole_manifest) = sources[-1], sources[0]
        for source in sources if check else []:
            check_files(*source)
        schema = read_schema(folder, manifest)
        encoders = Encoders.load(folder / ENCODERS, schema)
        check_lookups(folder, manifest, schema, encoders)
        found = cls(
            manifest.whole() if manifest.base else manifest,
            Requests(schema, encoders),
            Tables.open(whole, whole_manifest, *sources[1:]),
            load_program(folder, manifest, compiled),
        )
        for source in sources:
            if read_manifest(source[0]) != source[1]:
                raise UserError(f"{source[0]} was replaced by another package while it was loaded. Load it again.")
        if warm_up:
            found.warm_up(warm_up)
        return found

    def warm_up(self, rows: int) -> None:
        """Answers a request of one row and one of `rows`, so that the first of a user is not slower than others.

        Raises:
            UserError: a prediction is not finite.
        """
        self.requests.warm_up()
        row = dict.fromkeys(self.requests.columns[:1])
        for number in {1, rows}:
            for task, value_B in self.score([row] * number).items():
                if not np.isfinite(value_B).all():
                    raise UserError(
                        f"{self.manifest.model.run}, step {self.manifest.model.step}: the prediction of {task} for an empty "
                        "row is not finite. Export another checkpoint."
                    )

    def score(
        self, rows: Rows, user: Mapping[str, Any] | None = None, where: str = "rows", extra: bool = False
    ) -> dict[str, np.ndarray]:
        """Predictions of each task, float32 [B]: the probability of a binary one, in the label's unit of a regression.

        Args:
            rows: raw values by the columns of `requests.columns`, as in the log; what a row lacks is missing.
            user: values that all rows share, for columns that no row has. where: what the rows are called in errors.
            extra: ignore columns that the schema does not have, or computes.
        Returns: NaN where a number of a row is so far from those of training that float32 overflows: the log's job takes all
            that float32 holds, and divides it by the deviation.
        Raises:
            UserError: a value that its column cannot have, an unknown column.
        """
        return self.predictions(self.score_encoded(self.requests.encode(rows, user, where, extra)))

    def score_encoded(self, rows: Encoded) -> Tensor:
        """logit_BT of encoded rows: of a regression the prediction itself."""
        with torch.inference_mode():
            most = min(CHUNK, max(NUMBERS // max(self.manifest.embedding_dim, 1), 1))
            parts = [self.program(self.tables.embed(part), part.dense_BD) for part in _parts(rows, most) if len(part)]
            return torch.cat(parts) if parts else torch.zeros(0, len(self.manifest.tasks))

    def predictions(self, logit_BT: Tensor) -> dict[str, np.ndarray]:
        """What `score` gives, of what `score_encoded` gives."""
        return {
            task: (torch.sigmoid(logit_BT[:, place]) if kind == "binary" else logit_BT[:, place]).numpy()
            for place, (task, kind) in enumerate(self.manifest.tasks.items())
        }

    def batches(self, batches: Iterable[pa.RecordBatch], keep: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Predictions of Arrow batches: of each one its columns `keep`, then a float32 column a task; others are ignored.

        Raises:
            UserError: as `score`; a column of `keep` that is missing, or has the name of a task.
        """
        if clash := set(keep) & self.manifest.tasks.keys():
            raise UserError(f"keep: {', '.join(sorted(clash))} is the name of a task: rename the column first")
        for batch in batches:
            if absent := [name for name in keep if name not in batch.schema.names]:
                raise UserError(f"keep: the batch has no column {absent[0]}")
            kept = {name: batch.column(name) for name in keep}
            scored = {task: pa.array(value_B) for task, value_B in self.score(batch, extra=True).items()}
            yield pa.RecordBatch.from_pydict(kept | scored)


def _parts(rows: Encoded, most: int) -> Iterator[Encoded]:
    """Rows in parts of at most `most`, and of ITEMS ids but for a list that all rows share."""
    half = len(rows) // 2
    items = sum(len(own.id_V) for own in rows.lists.values() if len(own.length_R) > 1)
    if half and (len(rows) > most or items > ITEMS):
        yield from _parts(rows.slice(0, half), most)
        yield from _parts(rows.slice(half, len(rows)), most)
    else:
        yield rows


def _sources(folder: Path, bases: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    """A package's folder and manifest; of a delta after those of its bases. Raises UserError where they do not fit."""
    manifest = read_manifest(folder)
    if (manifest.base is None) != (not bases):
        raise UserError(
            f"{folder} is a whole package, which has no base. Leave base out."
            if manifest.base is None
            else f"{folder} changes the package {manifest.base.package[:16]}: give that one's folder as well, base=FOLDER"
        )
    sources = [*((each, read_manifest(each)) for each in bases), (folder, manifest)]
    for (_, before), (where, delta) in pairwise(sources):
        check_base(before.whole() if before.base else before, where, delta)
    return sources


def read_schema(folder: Path, manifest: Manifest) -> Schema:
    """The schema of a package. Raises UserError where it is not the one that the checkpoint was trained with."""
    schema = Schema.load(folder / SCHEMA)
    for name in (SCHEMA, *(f"{ENCODERS}/{file}" for file in encoder_files(schema))):
        if name not in manifest.files:
            raise UserError(f"{folder}: its manifest has no checksum of {name}. {HINT}")
    if schema.fingerprint != manifest.model.fingerprint:
        raise UserError(
            f"{folder / SCHEMA}: fingerprint {schema.fingerprint}, the model was trained with "
            f"{manifest.model.fingerprint}: the schema changed after the export. {HINT}"
        )
    kinds = {name: task.kind for name, task in schema.tasks.items()}
    if other := [name for name, kind in manifest.tasks.items() if kinds.get(name) != kind]:
        raise UserError(f"{folder}: the manifest's task {other[0]} is not the schema's. {HINT}")
    width = max((columns.stop for columns in schema.dense_ranges.values()), default=0)
    if width != manifest.dense_width:
        raise UserError(f"{folder}: dense_width {manifest.dense_width}, the schema's rows have {width}. {HINT}")
    for lookup in manifest.lookups:
        if lookup.feature not in schema.sparse or lookup.table not in manifest.tables:
            raise UserError(f"{folder}: look-up of {lookup.feature} in {lookup.table}: one is unknown. {HINT}")
    return schema


def check_lookups(folder: Path, manifest: Manifest, schema: Schema, encoders: Encoders) -> None:
    """Raises UserError unless the tables have the rows that ids are encoded for, in the order in which `Encoded` has them."""
    for lookup in manifest.lookups:
        table, rows = schema.table_of(lookup.feature), manifest.tables[lookup.table].num_embeddings
        if (ids := encoders.num_embeddings(table)) != rows:
            raise UserError(
                f"{folder}: table {lookup.table} has {rows:,} rows, the encoders {ids:,} ids of {table}. {HINT}"
            )
        if (lookup.pooling == "single") != (lookup.feature in schema.single):
            raise UserError(f"{folder}: look-up of {lookup.feature} is {lookup.pooling}, in the schema not. {HINT}")
    single = list(dict.fromkeys(lookup.feature for lookup in manifest.lookups if lookup.pooling == "single"))
    if single != list(schema.single):
        raise UserError(
            f"{folder}: look-ups of {', '.join(single)}, the schema's order is {', '.join(schema.single)}. {HINT}"
        )
