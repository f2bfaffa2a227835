"""Settings of jobs.preprocess."""

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from features.schema.splits import utc
from pipeline.ingest.files import UNPACK_RATIO
from pipeline.ingest.state import Order


class EncodersFrom(BaseModel):
    """The dataset whose encoders are used; None: new ones are fitted."""

    model_config = ConfigDict(extra="forbid")
    from_: Path | None = Field(None, alias="from")


class PreprocessConfig(BaseModel):
    """Settings of jobs.preprocess.

    Attributes:
        input: folder below which the schema's files are, on any file system that fsspec knows.
        out: the dataset to write.
        date: one day: files whose pattern has {date} are those of that day, and the dataset is out/DATE.
        encoders: from=DATASET uses its fitted encoders, None fits new ones (or takes those of the first day in `out`).
        labels: none reads the features alone, for files to be scored: no outcomes, no columns of labels and weights. It
            needs the encoders of another dataset.
        as_of: until when outcomes are complete; None: each stream's last one that belongs to an impression, and with `date`
            the end of the last day whose files are there.
        order: of the rows: shuffled by a hash, by time, or as they were read.
        seed: of the shuffle.
        runner: direct (on this machine), or another Beam runner (pipeline/ingest/runners.py) with its flags in `options`.
        workers: processes of the direct runner.
        options: flags of Beam's command line.
        rows_per_row_group, rows_per_shard: sizes of what is written; shuffled shards hold about as many rows.
        unit_bytes: how much of the raw files a worker reads at a time; row ids (and so the shuffle) depend on it, unless the
            schema names row_id.
        bucket_bytes: about how much of the raw files goes into one bucket of a join.
        max_unpack_ratio: a compressed file may unpack to so many times its size (and any to 256 MiB); more stops the job.
        max_bad_fraction: the job stops when a larger share of the rows is bad.
        overwrite: replace a dataset at `out`.
    """

    model_config = ConfigDict(extra="forbid")
    input: str
    out: Path
    date: datetime.date | None = None
    encoders: EncodersFrom = EncodersFrom()
    labels: Literal["required", "none"] = "required"
    as_of: Annotated[AwareDatetime | None, BeforeValidator(utc)] = None
    order: Order = "shuffled"
    seed: int = 0
    runner: str = "direct"
    workers: int = Field(1, ge=1)
    options: list[str] = []
    rows_per_row_group: int = Field(8192, ge=1)
    rows_per_shard: int = Field(1 << 20, ge=1)
    unit_bytes: int = Field(32 << 20, ge=1)
    bucket_bytes: int = Field(128 << 20, ge=1)
    max_unpack_ratio: int = Field(UNPACK_RATIO, ge=1)
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    overwrite: bool = False

    @field_validator("date", mode="before")
    @classmethod
    def _written_out(cls, day: Any) -> Any:
        """Only as 2026-11-07: 20261107 would be seconds since 1970."""
        if isinstance(day, int) or (isinstance(day, str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", day)):
            digits = re.fullmatch(r"(\d{4})\D?(\d\d)\D?(\d\d)", str(day))
            wanted = "-".join(digits.groups()) if digits else "2026-11-07"
            raise ValueError(f"{day} is not written as a day is wanted here: write {wanted}")
        return day

    @field_validator("out")
    @classmethod
    def _local(cls, out: Path) -> Path:
        if re.match(r"\w+:/", str(out)):
            raise ValueError(f"{out} is a URL: a dataset is written to a mounted file system, so give a path")
        return out

    @property
    def folder(self) -> Path:
        """The dataset's folder."""
        return self.out / self.date.isoformat() if self.date else self.out
