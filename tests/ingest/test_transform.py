"""Preprocess in another pipeline gives what the job writes for files of the same rows."""

import errno
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from ingest_runs import SPLITS, content_of, dead_letters_of, no_beam, rows_by_id, run

from features.errors import UserError
from features.schema.schema import Schema
from pipeline.dataset import dataset
from pipeline.dataset.manifest import Manifest
from pipeline.ingest import schedule, transform
from pipeline.ingest.messages import Failure
from pipeline.ingest.transform import Preprocess, after, begin, dead_letters, do, read_rows, row_groups, spill
from pipeline.storage.files import storage_of

pytestmark = pytest.mark.integration

SIZES = {
    "rows_per_row_group": 32,
    "rows_per_shard": 100,
    "unit_bytes": 8000,
    "bucket_bytes": 20_000,
    "seed": 3,
    "max_bad_fraction": 0.01,
}
NUMBERS = {"id": pl.Int64, "at": pl.Int64, "price": pl.Float32, "age": pl.Int16, "qty": pl.Int8, "dwell": pl.Float64}


def batches_of(folder: Path, pattern: str) -> list[pa.Table]:
    """A batch of typed columns for 100 rows of the log, last rows first."""
    frames = [pl.read_csv(path, infer_schema=False, null_values=["", "NA"]) for path in sorted(folder.glob(pattern))]
    rows = pl.concat(frames)
    rows = rows.with_columns(pl.col(name).cast(NUMBERS[name]) for name in rows.columns if name in NUMBERS)
    if "recent" in rows.columns:
        rows = rows.with_columns(pl.col("recent").str.split("|"))
    return [rows.slice(start, 100).to_arrow() for start in range(0, rows.height, 100)][::-1]


def transformed(
    streams: dict[str, list[Any]], scratch: Path, content: dict[str, Any], **settings: Any
) -> dict[str, list]:
    """What a pipeline around the transform is given, by output."""
    folder = scratch.parent / f"{scratch.name}-sink"

    def put(name: str, batch: Any) -> None:
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(batch.to_pylist() if isinstance(batch, pa.RecordBatch) else [batch])
        (path / uuid.uuid4().hex).write_text(text)

    with beam.Pipeline(FnApiRunner()) as pipeline:
        inputs = {name: pipeline | f"source of {name}" >> beam.Create(batches) for name, batches in streams.items()}
        found = inputs | Preprocess(Schema.parse(content, where="mine.yaml"), scratch, **settings)
        for name, batches in found._asdict().items():
            batches | f"sink of {name}" >> beam.Map(lambda batch, name=name: put(name, batch))
    files = {name: sorted((folder / name).glob("*")) for name in found._fields}
    return {name: [row for path in paths for row in json.loads(path.read_text())] for name, paths in files.items()}


@pytest.fixture(scope="module")
def log(small_log, tmp_path_factory) -> Path:
    """The small log, and a bad row."""
    folder = shutil.copytree(small_log, tmp_path_factory.mktemp("with_bad_row") / "log")
    with (folder / "clicks-2.csv").open("a") as clicks:
        clicks.write("7,no number\n")
    return folder


@pytest.fixture(scope="module")
def of_files(log, small_content, tmp_path_factory) -> Path:
    """The dataset that the job makes of text files, without Beam."""
    out = tmp_path_factory.mktemp("of_files") / "out"
    with no_beam():
        run(log, out, small_content(), **SIZES)
    return out


def test_batches_become_the_rows_and_encoders_that_the_job_makes_of_files(
    of_files, small_log, small_content, tmp_path, caplog
):
    impressions = batches_of(small_log, "impressions-*")
    impressions[0] = impressions[0].combine_chunks().to_batches()[0]
    clicks = [pa.concat_tables(batches_of(small_log, "clicks-*")[::-1]), pa.table({"id": [7], "dwell": ["no number"]})]
    found = transformed({"impressions": impressions, "click": clicks}, tmp_path / "scratch", small_content(), **SIZES)
    assert {split: len(found[split]) for split in SPLITS} == found["manifest"][0]["rows"]
    rows = [row | {"split": split} for split in SPLITS for row in found[split]]
    assert sorted(rows, key=lambda row: row["row_id"]) == rows_by_id(of_files)
    reasons = [[row["reason"] for row in letters] for letters in (found["dead_letters"], dead_letters_of(of_files))]
    assert reasons[0] == reasons[1] == ["dwell: 'no number' is not a number"]
    ours = tmp_path / "scratch" / "dataset"
    assert rows_by_id(ours) == rows_by_id(of_files)
    for path in of_files.glob("encoders/vocabularies/*"):
        assert pl.read_parquet(path).equals(pl.read_parquet(ours / path.relative_to(of_files))), path
    moments = [json.loads((path / "encoders" / "encoders.json").read_text()) for path in (ours, of_files)]
    assert alike(*moments), moments
    assert not caplog.messages  # nor a warning of Beam's


def alike(one: Any, other: Any) -> bool:
    """Whether plain data is equal but for the last digits of sums, which depend on how rows were cut into parts."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-12))


# Without Beam, as an engine may run it


def in_a_loop(transform: Preprocess, streams: dict[str, list[pa.Table]]) -> dict[str, Any]:
    """The manifest. Everything is done twice, as after an attempt whose end an engine has not seen."""
    use = transform.run
    spilled = [(name, batch) for name, batches in streams.items() for batch in batches]
    listed = [[spill(use.folder, name, batch) for name, batch in spilled] for _ in range(2)]
    assert listed[0] == listed[1]
    work = [list(begin(use, found)) for found in (listed[0], listed[0][::-1])]
    assert work[0] == work[1]
    for step in use.steps:
        reports = [[(number, do(use, step, number, each)) for number, each in work[0]] for _ in range(2)]
        work = [list(after(use, reports[1], step=step)) for _ in range(2)]
    assert work[0] == work[1]
    return work[0][0]


@pytest.fixture
def alone(small_content) -> dict[str, Any]:
    """A schema of impressions alone, with row ids of the job's own."""
    content = small_content()
    for key in ("outcomes", "row_id", "key"):
        del content["source"][key]
    return content | {"tasks": {"bought": {"kind": "binary", "label": "qty > 1"}}}


@pytest.fixture(params=["folder", "store"])
def scratch(request, tmp_path) -> Path:
    return tmp_path / "scratch" if request.param == "folder" else request.getfixturevalue("memory")


def test_two_equal_batches_are_twice_the_rows(scratch, small_log, alone):
    batches = batches_of(small_log, "impressions-*")
    transform = Preprocess(Schema.parse(alone, where="mine.yaml"), str(scratch), rows_per_row_group=400)
    manifest = in_a_loop(transform, {"impressions": [*batches, batches[0]]})
    assert sum(manifest["rows"].values()) == 1000
    groups = [group for split in SPLITS for group in row_groups(scratch / "dataset", split, manifest)]
    assert len(groups) == 3
    assert len({row_id for [rows] in map(read_rows, groups) for row_id in rows["row_id"].to_pylist()}) == 1000


def test_a_commit_whose_worker_was_killed_is_ended_by_the_next_attempt(scratch, small_log, alone, monkeypatch):
    batches = batches_of(small_log, "impressions-*")
    made = Preprocess(Schema.parse(alone, where="mine.yaml"), str(scratch))
    killed = Preprocess(Schema.parse(alone, where="mine.yaml"), str(scratch / "killed"))

    class Killed(BaseException):
        pass

    def begun(folder: Path) -> Any:
        monkeypatch.setattr(dataset, "storage_of", storage_of)
        raise Killed

    manifest = in_a_loop(made, {"impressions": batches})
    monkeypatch.setattr(dataset, "storage_of", begun)
    with pytest.raises(Killed):
        in_a_loop(killed, {"impressions": batches})
    transform._planned.cache_clear()  # of the worker that was killed
    for _ in range(2):
        assert list(after(killed.run, [(0, Failure("never asked"))], step=killed.run.steps[-1])) == [manifest]
    files = content_of(scratch / "dataset")
    assert content_of(scratch / "killed" / "dataset") == files


def test_a_file_of_dead_letters_is_given_whole_however_many_row_groups_it_has(of_files, tmp_path):
    copied = shutil.copytree(of_files, tmp_path / "copied")
    manifest = json.loads((copied / "manifest.json").read_text())
    [path] = [copied / file.path for file in Manifest.model_validate(manifest).dead_letter_files]
    rows = pa.concat_tables([pq.read_table(path)] * 5)
    pq.write_table(rows, path, row_group_size=2)
    found = [batch for part in dead_letters(copied, manifest) for batch in read_rows(part)]
    assert pa.Table.from_batches(found).equals(rows)


def test_encoders_of_a_dataset_encode_batches_without_labels(of_files, small_log, small_content, tmp_path):
    batches = batches_of(small_log, "impressions-*")[::2]
    schema = Schema.parse(small_content(), where="mine.yaml")
    in_a_loop(Preprocess(schema, tmp_path / "scratch", of_files, labels="none", **SIZES), {"impressions": batches})
    ids = [row["id"] for batch in batches for row in batch.to_pylist()]
    ours, theirs = (
        {row["row_id"]: row for row in rows_by_id(path)} for path in (tmp_path / "scratch/dataset", of_files)
    )
    assert sorted(ours) == sorted(ids)
    assert all(ours[id_][name] == theirs[id_][name] for id_ in ids for name in schema.columns)


@pytest.mark.parametrize("killed_after", ["encoders/encoders.json", "scratch/plan"])
def test_encoders_and_a_state_are_copied_again_by_a_second_attempt(
    killed_after, small_log, alone, steps_alone, tmp_path
):
    alone["source"]["counters"] = {"spent": {"by": "user", "of": "price", "take": "sum"}}
    alone["dense"]["spent"] = {}
    run(small_log, tmp_path / "past", alone, **SIZES)
    schema, settings = Schema.parse(alone, where="mine.yaml"), {"state": {"from": str(tmp_path / "past")}} | SIZES
    use = Preprocess(schema, tmp_path / "scratch", tmp_path / "past", **settings).run
    spilled = [spill(use.folder, "impressions", batch) for batch in batches_of(small_log, "impressions-*")]
    work = list(begin(use, spilled))
    whole = content_of(use.staging)
    for name in whole:
        if name != killed_after:
            (use.staging / name).unlink()
    assert list(begin(use, spilled)) == work
    assert content_of(use.staging).keys() == whole.keys()


def test_what_is_wrong_with_rows_stops_the_pipeline_with_the_line_of_the_job(small_log, alone, tmp_path):
    batch = batches_of(small_log, "impressions-*")[0]
    text = batch.drop_columns("qty").append_column("qty", pa.array(["many"] * batch.num_rows))
    transform = Preprocess(Schema.parse(alone, where="mine.yaml"), tmp_path / "scratch")
    with pytest.raises(UserError, match=r"100 of 100 rows of impressions are bad"):
        in_a_loop(transform, {"impressions": [text]})
    with pytest.raises(UserError, match="no batches of impressions"):
        list(begin(transform.run, []))
    assert not (tmp_path / "scratch" / "dataset").exists()


def test_a_step_whose_reports_cannot_be_written_stops_the_pipeline(small_log, alone, tmp_path, monkeypatch):
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(schedule, "write_json", full)
    transform = Preprocess(Schema.parse(alone, where="mine.yaml"), tmp_path / "scratch")
    with pytest.raises(UserError, match="the reports of step read could not be written"):
        in_a_loop(transform, {"impressions": batches_of(small_log, "impressions-*")})


def test_what_a_transform_cannot_do_is_refused_before_the_pipeline_runs(small_content, alone, tmp_path):
    schema = Schema.parse(small_content(), where="mine.yaml")
    with pytest.raises(UserError, match="workers: no setting of the transform"):
        Preprocess(schema, tmp_path, workers=2)
    with pytest.raises(UserError, match="batches come in no order"):
        Preprocess(schema, tmp_path, order="input")
    with pytest.raises(
        UserError, match=r"^Preprocess: seed: .*valid integer.*; rows_per_shard: .*greater than or equal to 1$"
    ):
        Preprocess(schema, tmp_path, seed="many", rows_per_shard=0)
    for places in ({"scratch": "s3://user:secret1@bucket/x"}, {"scratch": tmp_path, "encoders": "s3://a:secret1@b/x"}):
        with pytest.raises(UserError, match="has a password") as refused:
            Preprocess(schema, **places)
        assert "secret1" not in str(refused.value)
    split = {"by": "row_index", "modulo": 2, "train": [0], "valid": [1]}
    with pytest.raises(UserError, match="rows of batches have no index"):
        Preprocess(Schema.parse(alone | {"split": split}, where="mine.yaml"), tmp_path)
    (tmp_path / "dataset").mkdir()
    with pytest.raises(UserError, match="dataset exists"):
        Preprocess(schema, tmp_path)
    pipeline = beam.Pipeline(FnApiRunner())
    with pytest.raises(UserError, match="got batches of impressions; the schema's streams are impressions, click"):
        pipeline | beam.Create([1]) | Preprocess(schema, tmp_path / "other")
    with pytest.raises(UserError, match="impressions has a dict: give pyarrow Tables or RecordBatches"):
        spill(tmp_path, "impressions", {"id": 1})
