"""What tests of the ingest job share: running it, with Beam or without, and reading what it wrote."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset.manifest import Manifest
from pipeline.ingest import job as ingest_job
from pipeline.ingest import schedule
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.ingest.messages import ReadWork, Work
from pipeline.ingest.schedule import Limits
from pipeline.ingest.state import Job
from pipeline.ingest.steps import run_step

SPLITS = ("train", "valid", "test")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}

# Of jobs on `small_log`: several units, buckets and shards.
SMALL_SIZES = {"rows_per_row_group": 32, "rows_per_shard": 100, "unit_bytes": 8000, "bucket_bytes": 20_000}


def run(folder: Path | str, out: Path, content: dict[str, Any], **settings: Any) -> Manifest:
    config = PreprocessConfig(input=str(folder), out=out, **settings)
    return preprocess(config, Schema.parse(content, where="mine.yaml"))


def refused(folder: Path | str, out: Path, content: dict[str, Any], **settings: Any) -> str:
    """The one line that stops a job, which must leave everything beside `out` as it was."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        run(folder, out, content, **settings)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def run_in_a_loop(_: PreprocessConfig, job: Job, limits: Limits, units: list[ReadWork]) -> None:
    """Does what the Beam pipeline does, one element after the other: in place of job.run_steps, and ten times as quick."""
    work: list[tuple[int, Work]] = list(enumerate(units))
    for step in schedule.steps_of(job):
        reports = [(number, run_step(job, step, number, each)) for number, each in work]
        work = list(schedule.after(reports, job, limits, step))
    ingest_job.raise_failure(job)


@contextmanager
def no_beam() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_job, "run_steps", run_in_a_loop)
        yield


def rows_of(dataset: Path, split: str) -> pa.Table:
    """A split's rows, in the order of its shards."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((dataset / split).glob("*.parquet")))


def rows_by_id(dataset: Path) -> list[dict[str, Any]]:
    """The rows of all splits, each with its `split`, in the order of their ids."""
    rows = [
        row | {"split": split}
        for split in SPLITS
        if (dataset / split).exists()
        for row in rows_of(dataset, split).to_pylist()
    ]
    return sorted(rows, key=lambda row: row["row_id"])


def dead_letters_of(dataset: Path) -> list[dict[str, Any]]:
    found = [row for path in (dataset / "dead_letters").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda letter: (letter["stream"], letter["file"], letter["line"]))


def values_of(dataset: Path, table: str) -> dict[int, str]:
    """The values of a vocabulary by their ids."""
    rows = pq.read_table(dataset / "encoders" / "vocabularies" / f"{table}.parquet").to_pylist()
    return {row["id"]: row["value"] for row in rows}


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_conf(folder: Path, **contents: dict[str, Any]) -> Path:
    """A --config-dir with data groups of these schemas; returns the folder."""
    (folder / "data").mkdir(parents=True)
    for name, content in contents.items():
        group = yaml.safe_dump({"input": "nowhere", "schema": content}, sort_keys=False)
        (folder / "data" / f"{name}.yaml").write_text(group)
    return folder
