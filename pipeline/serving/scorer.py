"""A package in memory: rows in, predictions of each task out."""

# Shapes: B rows, T tasks, E numbers of all embeddings of a row, D dense columns.

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from pipeline.serving.encoded import Encoded
from pipeline.serving.manifest import ENCODERS, HINT, SCHEMA, Manifest, check_files, read_manifest
from pipeline.serving.program import load_program
from pipeline.serving.requests import Requests
from pipeline.serving.tables import Tables

CHUNK = 8192  # rows that are scored at once: their embeddings and activations stay within tens of MB

Rows: TypeAlias = pa.Table | pa.RecordBatch | pl.DataFrame | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Scorer:
    """The model of a package. Every method may be called by several threads at a time.

    Attributes:
        manifest: of the package; `manifest.model` says which checkpoint it is.
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
        base: Path | str | None = None,
    ) -> "Scorer":
        """Opens a package.

        Args:
            path: its folder. compiled: run its compiled program, which is code of this machine; False: the portable one.
            check: compare every file's checksum; False: of a package that was checked before, on this machine.
            warm_up: rows of a first answer, whose predictions must be finite; 0: none.
            base: the whole package that a delta changes; None for a whole package.
        Raises:
            UserError: a package that is missing, damaged, of another version, or does not fit together; another base.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        delta = None
        if (manifest.base is None) != (base is None):
            raise UserError(
                f"{folder} changes the package {manifest.base.package}: name that one's folder as well, base=FOLDER"
                if manifest.base
                else f"{folder} is a whole package, which has no base. Leave base out."
            )
        if check:
            check_files(folder, manifest)
        whole, whole_manifest = folder, manifest
        if base is not None and manifest.base is not None:
            whole, delta = Path(base), (folder, manifest)
            whole_manifest = read_manifest(whole)
            if whole_manifest.checksum != manifest.base.package:
                raise UserError(
                    f"{folder} changes the package {manifest.base.package}, {whole} is {whole_manifest.checksum}. "
                    "Name the one that it was exported against."
                )
            if check:
                check_files(whole, whole_manifest)
        schema = read_schema(folder, manifest)
        encoders = Encoders.load(folder / ENCODERS, schema)
        found = cls(
            manifest,
            Requests(schema, encoders),
            Tables.open(whole, whole_manifest, delta),
            load_program(folder, manifest, compiled),
        )
        if warm_up:
            found.warm_up(warm_up)
        return found

    def warm_up(self, rows: int) -> None:
        """Answers a request of one row and one of `rows`, so that the first of a user is not slower than others.

        Raises:
            UserError: a prediction is not finite.
        """
        row = dict.fromkeys(self.requests.columns[:1])
        for number in {1, rows}:
            for task, value_B in self.score([row] * number).items():
                if not np.isfinite(value_B).all():
                    raise UserError(
                        f"{self.manifest.model.run}, step {self.manifest.model.step}: the prediction of {task} for an empty "
                        "row is not finite. Export another checkpoint."
                    )

    def score(self, rows: Rows, user: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Predictions of each task, float32 [B]: the probability of a binary one, in the label's unit of a regression.

        Args:
            rows: raw values by the columns of `requests.columns`, as in the log; what a row lacks is missing.
            user: values that all rows share, for columns that no row has.
        Raises:
            UserError: a value that its column cannot have, an unknown column.
        """
        return self.predictions(self.score_encoded(self.requests.encode(rows, user)))

    def score_encoded(self, rows: Encoded) -> Tensor:
        """logit_BT of encoded rows: of a regression the prediction itself."""
        with torch.inference_mode():
            parts = []
            for first in range(0, len(rows), CHUNK):
                part = rows.slice(first, first + CHUNK) if len(rows) > CHUNK else rows
                parts.append(self.program(self.tables.embed(part), part.dense_BD))
            return torch.cat(parts) if parts else torch.zeros(0, len(self.manifest.tasks))

    def predictions(self, logit_BT: Tensor) -> dict[str, np.ndarray]:
        """What `score` gives, of what `score_encoded` gives."""
        return {
            task: (torch.sigmoid(logit_BT[:, place]) if kind == "binary" else logit_BT[:, place]).numpy()
            for place, (task, kind) in enumerate(self.manifest.tasks.items())
        }

    def batches(self, batches: Iterable[pa.RecordBatch], keep: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Predictions of Arrow batches: of each one with its columns `keep`, then a float32 column a task.

        Raises:
            UserError: as `score`; a column of `keep` that is missing, or has the name of a task.
        """
        if clash := set(keep) & self.manifest.tasks.keys():
            raise UserError(f"keep: {', '.join(sorted(clash))} is the name of a task: rename the column first")
        for batch in batches:
            if absent := [name for name in keep if name not in batch.schema.names]:
                raise UserError(f"keep: the batch has no column {absent[0]}")
            kept = {name: batch.column(name) for name in keep}
            scored = {task: pa.array(value_B) for task, value_B in self.score(batch).items()}
            yield pa.RecordBatch.from_pydict(kept | scored)


def read_schema(folder: Path, manifest: Manifest) -> Schema:
    """The schema of a package. Raises UserError where it is not the one that the checkpoint was trained with."""
    schema = Schema.load(folder / SCHEMA)
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
