"""jobs.evaluate with slices and keys that cannot be: one line each, and texts of a log that would break the names of slices."""

import copy
import csv
import shutil
from pathlib import Path

import polars as pl
import pytest
import sliced_log
from job_calls import Call, assert_one_line

from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

pytestmark = pytest.mark.integration

ODD = [
    'a "b" c',
    "x=y, z=w",
    "line\nbreak",
    "missing",
    "unseen",
    "ü漢",
    "a\x1b[31m",
    " padded ",
    "",
    "'",
    "[*?]",
    "plain",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a log whose devices are ODD."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = sliced_log.rows_of_log(600)
    for number, row in enumerate(rows):
        row["device"], row["session"] = ODD[number % len(ODD)], f"session {number}"
    (folder / "log").mkdir()
    for name, content in (("log-1.csv", rows), ("users.csv", [{"user": "u1", "country": "DE", "age": "30"}])):
        with (folder / "log" / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(content[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(content)
    content = copy.deepcopy(sliced_log.CONTENT)
    content["source"]["multiline"] = True
    preprocess(
        PreprocessConfig(input=str(folder / "log"), out=folder / "dataset", rows_per_row_group=32, min_joined=0),
        Schema.parse(content, where="odd.yaml"),
    )
    settings = Settings(batch_size=64, lanes=2, epochs=1, max_steps=1, checkpoint_every=1, threads=1)
    model = ModelConfig(fusion={"name": "adatt", "levels": [[4]]}, tower=[4])
    train(TrainConfig(dataset=folder / "dataset", run=folder / "run", model=model, train=settings))
    return folder / "run"


FAULTS = [
    ("slices=[devise]", "devise is not a kept column", "did you mean device?"),
    ("slices=[hashed]", "hashed is not a kept column or a categorical feature with a vocabulary"),
    ("slices=[price_bin]", "price_bin is not a kept column"),
    ("slices=[device,device]", "device is there twice"),
    ("slices=[[device,device]]", "device is there twice in the cross device, device"),
    ("slices=[[device]]", "slices"),
    ("slices=[cheap,{sql: 'cheap=1'}] & min_rows=1", "slices: cheap and cheap=1 both have a slice cheap=1: leave one out"),
    ("slices=[{sql: position}]", "'position' is Int64, a condition is needed"),
    ("slices=[{sql: 'position <='}]", "slices: sql"),
    ("slices=[{sql: ''}]", "slices: sql"),
    ("slices=[{sql: '1 = 1'}]", "reads no column"),
    ("slices=[{sql: 'city = 1'}]", "city is not a kept column"),
    ("slices=[{sql: 'device > 1'}]", "slices.sql"),
    ("slices=[{sql: \"device IN (SELECT a FROM b)\"}]", "slices: sql"),
    ("slices=[{sql: 'COUNT(device) > 1'}]", "slices: sql"),
    ("slices=[{column: who_age, edges: [30, 18]}]", "edges must ascend"),
    ("slices=[{column: who_age, edges: [18, 18]}]", "edges must ascend"),
    ("slices=[{column: who_age, edges: [.nan]}]", "slices"),
    ("slices=[{column: who_age, edges: []}]", "slices"),
    ("slices=[{column: device, edges: [1]}]", "device is kept as text, which has no edges"),
    ("slices=[{column: price_bin, edges: [1]}]", "price_bin is not a number"),
    ("slices=[{column: age, edges: [20, 20.000000001]}]", "edges of age are closer to each other than float32"),
    ("slices=[{column: age, edge: [20]}]", "slices"),
    ("slices=[position] & by_time=[week]", "by_time"),
    ("cluster_by=usr", "cluster_by=usr: not a kept column", "did you mean user?", "cluster_by=row"),
    ("group=city", "group=city: not a kept column"),
    ("share_by=nothing", "share_by=nothing: not a kept column"),
    ("share=0", "share"),
    ("share=1.5", "share"),
    ("buckets=0", "buckets"),
    ("top=0", "top"),
    (
        "slices=[session,[session,device],[session,city],[session,position],[session,cheap]] & top=999 & min_rows=1 & "
        "buckets=1000",
        "slices with 1,000 buckets", "at most 1,048 can be measured", "lower top",
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_a_fault_of_slices_and_keys_is_one_line(run: Path, call: Call, fault: tuple[str, ...]) -> None:
    settings, *words = fault
    said = call("evaluate", f"run={run}", "threads=1", *settings.split(" & "))
    assert_one_line(said, *words)
    assert not (run / "evaluations").exists()


def test_odd_texts_are_slices_of_unlike_names_on_one_line(run: Path, call: Call) -> None:
    said = call(
        "evaluate", f"run={run}", "threads=1", "slices=[device,[device,position]]", "min_rows=1", "top=1000", "split=train"
    )  # fmt: skip
    assert "error" not in said
    figures = pl.read_parquet(run / "evaluations" / "train-00000001.parquet").filter(task="click", metric="rows")
    devices = figures.filter(dimension="device")
    shards = Dataset(run.parent / "dataset").shards("train")
    column = pl.concat([pl.read_parquet(run.parent / "dataset" / s.path, columns=["raw.device"]) for s in shards])
    assert devices.height == column["raw.device"].n_unique() == len(ODD)  # an empty one is missing
    for names in (devices["slice"], figures["slice"]):
        assert names.n_unique() == len(names)
        assert all(name.isprintable() for name in names)
    expected = {
        "device=missing", 'device="missing"', 'device="unseen"', 'device="x=y, z=w"', 'device=a "b" c', 'device="line\\nbreak"',
        "device=ü漢", 'device="a\\u001b[31m"', 'device=" padded "', "device='", "device=[*?]", "device=plain",
    }  # fmt: skip
    assert set(devices["slice"]) == expected


@pytest.mark.parametrize(("place", "words"), [(200, "damaged"), (-100, "its footer is not the manifest's")])
def test_a_damaged_shard_is_one_line(run: Path, call: Call, tmp_path: Path, place: int, words: str) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(run.parent / "dataset", dataset)
    [shard] = Dataset(dataset).shards("test")
    data = bytearray((dataset / shard.path).read_bytes())
    data[place : place + 90] = bytes(90)
    (dataset / shard.path).write_bytes(data)
    said = call("evaluate", f"run={run}", f"dataset={dataset}", "threads=1", "slices=[device]")
    assert_one_line(said, shard.path, words)
