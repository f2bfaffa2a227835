"""Settings of jobs.preprocess."""

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from features.schema.splits import utc
from pipeline.dataset.days import MissingDays, written_out
from pipeline.ingest.files import UNPACK_RATIO
from pipeline.ingest.state import Order
from pipeline.storage.store_path import Place


def _iso(day: Any) -> Any:
    """Only as 2026-11-07: 20261107 would be seconds since 1970."""
    if isinstance(day, int) or (isinstance(day, str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", day)):
        raise ValueError(f"{day} is no date as YYYY-MM-DD: write {written_out(day)}")
    return day


Day = Annotated[datetime.date | None, BeforeValidator(_iso)]


class EncodersFrom(BaseModel):
    """The dataset whose encoders are used; None: new ones are fitted."""

    model_config = ConfigDict(extra="forbid")
    from_: Place | None = Field(None, alias="from")


class StateFrom(BaseModel):
    """The dataset with whose state histories and counters begin, or `empty`; None: see pipeline.ingest.past_start."""

    model_config = ConfigDict(extra="forbid")
    from_: Annotated[str, Field(min_length=1)] | None = Field(None, alias="from")


class PreprocessConfig(BaseModel):
    """Settings of jobs.preprocess.

    Attributes:
        input: folder below which the schema's files are, on any file system that fsspec knows.
        out: the dataset to write.
        date: one day: files whose pattern has {date} are those of that day, and the dataset is out/DATE.
        encoders: from=DATASET uses its fitted encoders, None fits new ones (or takes those of the first day in `out`).
        labels: none reads the features alone, for files to be scored: no outcomes, no columns of labels and weights. It
            needs the encoders of another dataset.
        state: from=DATASET begins histories and counters with its state, from=empty with nothing. None: with `date` the day
            before in `out`, else with encoders.from that dataset, or the newest day beside it where it is a day.
        missing_days: skip takes the newest earlier day where the day before `date` is missing.
        as_of: until when outcomes are complete; None: each stream's last one that belongs to an impression, and with `date`
            the end of the last day whose files are there.
        order: of the rows: shuffled by a hash, by time, or as they were read.
        seed: of the shuffle.
        runner: direct (on this machine), or another one of pipeline/ingest/runners/registry.py.
        workers: processes of the direct runner, or of each of `hosts`.
        options: flags of Beam's command line.
        master: of the Spark cluster, such as spark://HOST:7077, for runner=spark.
        hosts: HOST:PORT of the worker pools, for runner=hosts.
        scratch: folder for the files between steps, a path or URL that the driver and all workers see; None: beside `out`.
        rows_per_row_group, rows_per_shard: sizes of what is written; shuffled shards hold about as many rows.
        unit_bytes: how much of the raw files a worker reads at a time; row ids (and so the shuffle) depend on it, unless the
            schema names row_id.
        bucket_bytes: about how much of the raw files goes into one bucket of a join.
        broadcast_bytes: side tables whose raw files have at most so many bytes are held by every worker; larger ones are joined
            a bucket at a time.
        max_unpack_ratio: a compressed file may unpack to so many times its size (and any to 256 MiB); more stops the job.
        max_bad_fraction: the job stops when a larger share of the rows is bad.
        min_joined: share of the rows of each outcome, duplicates apart, that must belong to an impression; 0: no check, also of
            side tables that have a row for no impression. With
            `date` or `encoders.from` outcomes may belong to other days' impressions: there only a stream of which no row at
            all belongs to one stops the job (see pipeline.ingest.join_check).
        overwrite: replace a dataset at `out`.
    """

    model_config = ConfigDict(extra="forbid")
    input: str
    out: Place
    date: Day = None
    encoders: EncodersFrom = EncodersFrom()
    labels: Literal["required", "none"] = "required"
    state: StateFrom = StateFrom()
    missing_days: MissingDays = "refuse"
    as_of: Annotated[AwareDatetime | None, BeforeValidator(utc)] = None
    order: Order = "shuffled"
    seed: int = 0
    runner: str = "direct"
    workers: int = Field(1, ge=1)
    options: list[str] = []
    master: str | None = None
    hosts: list[str] = []
    scratch: Place | None = None
    rows_per_row_group: int = Field(8192, ge=1)
    rows_per_shard: int = Field(1 << 20, ge=1)
    unit_bytes: int = Field(32 << 20, ge=1)
    bucket_bytes: int = Field(128 << 20, ge=1)
    broadcast_bytes: int = Field(64 << 20, ge=0)
    max_unpack_ratio: int = Field(UNPACK_RATIO, ge=1)
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    min_joined: float = Field(0.5, ge=0, le=1)
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """The dataset's folder."""
        return self.out / self.date.isoformat() if self.date else self.out
