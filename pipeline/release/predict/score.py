"""Step `score`: a shard of encoded rows to a file of predictions. It runs in workers, each of which loads the model once."""

# Shapes: B rows of a batch, N rows of a shard, T tasks.

import hashlib
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.split_reader import SplitReader
from pipeline.evaluation import predictions
from pipeline.evaluation.weights import Loading, ModelWeights, Tables
from pipeline.ingest.messages import Failure, Report
from pipeline.ingest.steps import reported
from pipeline.release.predict.manifest import Model, PredictionFile
from pipeline.run.run import Run
from pipeline.storage.files import storage_of, write_new
from pipeline.storage.store_path import StorePath, place

STEP = "score"


@dataclass(frozen=True)
class Scoring:
    """What every worker is given.

    Attributes:
        dataset: of the encoded rows. tasks: of the run; None: all.
        made: folder that becomes that of the predictions; what lies in its scratch/ is none of them.
        files: of predictions, one a shard. folder: of the steps' messages.
        threads: of the model; None: what torch takes.
        cache: what a worker has loaded.
    """

    model: Model
    dataset: Path
    tasks: list[str] | None
    made: Path
    files: int
    folder: Path
    tables: Tables
    batch_size: int
    threads: int | None
    cache: dict[str, ModelWeights] = field(default_factory=dict, compare=False, repr=False)

    @property
    def progress(self) -> Path:
        """Folder in which workers record their progress (see pipeline.ingest.progress)."""
        return self.folder / "progress"

    def name(self, number: int) -> str:
        """Of the file of a shard."""
        return f"part-{number:05d}-of-{self.files:05d}.parquet"

    @property
    def weights(self) -> ModelWeights:
        """The model with the checkpoint's weights, loaded once a worker. Raises UserError where that is another one by now."""
        if "weights" not in self.cache:
            if self.threads:
                torch.set_num_threads(self.threads)
            run, dataset = Run(place(self.model.run)), Dataset(self.dataset).only(self.tasks)
            weights = ModelWeights(run, dataset, ["test"], self.batch_size, Loading(self.tables))
            if weights.load(self.model.step).checksum != self.model.checkpoint:
                raise UserError(
                    f"{run.path}: the checkpoint of step {self.model.step} was replaced meanwhile. Run the same command again."
                )
            self.cache["weights"] = weights
        return self.cache["weights"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}


@dataclass(frozen=True)
class ScoreReport(Report):
    """A file that was written, `path` in Scoring.made."""

    step: ClassVar[str] = STEP
    file: PredictionFile


def run_score(scoring: Scoring, step: str, number: int, shard: Shard) -> Report | Failure:
    """Scores a shard."""
    return reported(partial(write_scored, scoring, number, shard), scoring.made.parent, scoring.progress, step, number)


def write_scored(scoring: Scoring, number: int, shard: Shard) -> ScoreReport:
    """Writes the predictions of a shard. Raises UserError, OSError."""
    table = scored(scoring.weights, shard, scoring.model)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
    name, content = put(scoring, number, sink.getvalue().to_pybytes())
    digest = hashlib.sha256(content).hexdigest()
    return ScoreReport(PredictionFile(path=name, rows=table.num_rows, bytes=len(content), sha256=digest))


def put(scoring: Scoring, number: int, content: bytes) -> tuple[str, bytes]:
    """Writes a file; returns its path in Scoring.made, and what is in it.

    On a store it has its final name at once, and where another attempt has put it before, that one's content stays: another
    machine may round the last digit otherwise. Elsewhere each attempt has a name of its own, to be renamed.
    """
    name = scoring.name(number)
    path = scoring.made / name
    if isinstance(path, StorePath):
        try:
            write_new(path, content)
        except FileExistsError:
            content = path.read_bytes()
        return name, content
    name = f"scratch/part-{number:05d}-{uuid.uuid4().hex}"
    storage_of(path).write(scoring.made / name, content)
    return name, content


@torch.inference_mode()
def scored(weights: ModelWeights, shard: Shard, model: Model) -> pa.Table:
    """The predictions of a shard's rows, in their order. Raises UserError where it cannot be read."""
    dataset = weights.dataset
    schema, kept = dataset.schema, list(dataset.schema.kept)
    reader = SplitReader(dataset.of([shard]), shard.split, weights.batch_size)
    row_ids, answers = [], []
    for batch, logit_BT in weights.scored(reader.batches()):
        real_B = batch.row_id_B >= 0
        row_ids.append(batch.row_id_B[real_B].numpy())
        answers.append({n: x_B[real_B].numpy() for n, x_B in predictions.answers(logit_BT, schema).items()})
    columns = {"row_id": np.concatenate(row_ids)}
    columns |= {name: np.concatenate([part[name] for part in answers]) for name in answers[0]}
    rows = predictions.shard_columns(dataset, shard, ["row_id", *kept])
    assert np.array_equal(rows["row_id"].to_numpy(), columns["row_id"])
    names = predictions.kept_names(schema, columns)
    found = {names[column]: rows[column] for column in kept} | {n: pa.array(x_N) for n, x_N in columns.items()}
    return pa.table(found).replace_schema_metadata({key: str(value) for key, value in model})
