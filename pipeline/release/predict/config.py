"""Settings of jobs.predict."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.dataset.days import MissingDays
from pipeline.evaluation.weights import Tables
from pipeline.ingest.config import Day, EncodersFrom, PreprocessConfig, StateFrom
from pipeline.storage.store_path import Place


class PredictConfig(BaseModel):
    """Settings of jobs.predict.

    Attributes:
        run: whose checkpoint scores.
        step: of it: newest, or a number.
        input: folder below which the schema's files are, on any file system that fsspec knows.
        out: the folder of predictions that is written.
        columns: raw, derived or added columns that are copied to the predictions, beside the schema's key.
        dataset: whose encoders and state are used; None: the one that the run was trained on.
        date: one day: files whose pattern has {date} are those of that day, and histories and counters those of the day before.
        state: from=DATASET begins histories and counters with its state, from=empty with nothing. None: with that of
            `dataset`, or where it is a day with that of the newest day beside it (before `date`).
        missing_days: skip takes the newest earlier day where the day before `date` is missing.
        tables: needed: only the rows of tables that the log looks up, for a model larger than memory.
        batch_size: rows at a time.
        threads: of the model in each worker; None: the cores, divided by `workers`; 1 with another runner
            than direct.
        rows_per_file: of predictions; a file is what a worker scores at a time.
        runner, workers, master, hosts, scratch, options: as of jobs.preprocess. Each worker loads the model.
        unit_bytes, bucket_bytes, broadcast_bytes, max_unpack_ratio, max_bad_fraction, min_joined: as of jobs.preprocess.
    """

    model_config = ConfigDict(extra="forbid")
    run: Place
    step: int | Literal["newest"] = "newest"
    input: str
    out: Place
    columns: list[str] = []
    dataset: Place | None = None
    date: Day = None
    state: StateFrom = StateFrom()
    missing_days: MissingDays = "refuse"
    tables: Tables = "all"
    batch_size: int = Field(8192, ge=1)
    threads: int | None = Field(None, ge=1)
    rows_per_file: int = Field(1 << 18, ge=1)
    runner: str = "direct"
    workers: int = Field(1, ge=1)
    master: str | None = None
    hosts: list[str] = []
    scratch: Place | None = None
    options: list[str] = []
    unit_bytes: int = Field(32 << 20, ge=1)
    bucket_bytes: int = Field(128 << 20, ge=1)
    broadcast_bytes: int = Field(64 << 20, ge=0)
    max_unpack_ratio: int = Field(500, ge=1)
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    min_joined: float = Field(0.5, ge=0, le=1)

    def encoding(self, folder: Path, encoders: Path) -> PreprocessConfig:
        """How the log becomes a dataset below `folder` with the encoders of another."""
        shared = PreprocessConfig.model_fields.keys() & type(self).model_fields.keys() - {"out", "state"}
        return PreprocessConfig(
            **{name: getattr(self, name) for name in shared},
            out=folder,
            encoders=EncodersFrom.model_validate({"from": encoders}),
            state=self.state,
            labels="none",
            order="input",
            rows_per_shard=self.rows_per_file,
        )
