"""A dataset made on a store has the bytes of the one made on disk, wherever its files between steps lie, and opens as that."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import content_of, run
from store_fixtures import FaultProxy
from test_job_day_state import content, day, drawn_rows, write_log

from features.errors import UserError
from jobs import inspect
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.entries import StateFile
from pipeline.dataset.past_state import opened
from pipeline.dataset.verify import verify
from pipeline.ingest import batch_objects, shuffle
from pipeline.ingest.files import find, open_raw
from pipeline.storage.files import copy_file
from pipeline.storage.store_path import StorePath, files_below, on_store
from pipeline.synthetic.event_log import LogConfig, generate

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

SIZES = {"rows_per_row_group": 4, "rows_per_shard": 8, "unit_bytes": 1500, "bucket_bytes": 2500}


def on(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their names."""
    if not isinstance(folder, StorePath):
        return content_of(folder)
    return {str(file).removeprefix(f"{folder}/"): file.read_bytes() for file in files_below(folder)}


def joined() -> dict[str, Any]:
    """Outcomes, histories, counters, and a side table of many rows that is joined a bucket at a time."""
    found = content(split={"by": "hash", "key": "id", "valid": 0.2, "test": 0.2})
    found["source"]["tables"] = {
        "goods": {"files": "goods.csv", "key": "item", "by": "item", "columns": {"brand": "string"}}
    }
    found["categorical"] |= {"goods_brand": {"dim": 4}}
    return found


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(folder, drawn_rows(0, 2, 40))
    (folder / "goods.csv").write_text("item,brand\n" + "".join(f"{item},b{item % 3}\n" for item in range(4)))
    return folder


def two_days(log: Path | str, out: Path, **settings: Any) -> Path:
    """The second day goes on from the encoders and the state of the first."""
    for number in (0, 1):
        run(
            log,
            out,
            joined(),
            date=day(number),
            max_bad_fraction=0,
            min_joined=0,
            broadcast_bytes=0,
            **SIZES,
            **settings,
        )
    return out


@pytest.fixture(scope="module")
def disk(log, tmp_path_factory, steps_alone) -> Path:
    return two_days(log, tmp_path_factory.mktemp("disk") / "days")


@pytest.fixture
def store(request) -> StorePath:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("store", "out", "scratch"),
    [
        ("memory", "store", None),
        ("memory", "store", "disk"),
        ("memory", "disk", "store"),
        ("memory", "disk", "disk"),
        ("s3", "store", None),
    ],
    indirect=["store"],
)
def test_days_on_a_store_have_the_bytes_of_those_on_disk(store, out, scratch, log, disk, tmp_path):
    places = {"store": store, "disk": tmp_path}
    for path in log.iterdir():
        copy_file(path, store / "raw" / path.name)
    settings = {"scratch": places[scratch] / "scratch"} if scratch else {}
    found = two_days(str(store / "raw"), places[out] / "days", **settings)
    assert on(found).keys() == on(disk).keys()
    assert on(found) == on(disk)
    assert {name.partition("/")[0] for name in on(store)} <= {
        "raw",
        "days",
    }  # nothing of the files between steps is left
    assert not content_of(tmp_path / "scratch")


def test_a_dataset_on_a_store_is_opened_by_one_listing_and_checked_as_on_disk(
    through_proxy: StorePath, proxy: FaultProxy, disk: Path, capsys
):
    days = through_proxy / "days"
    for name, content_ in on(disk).items():
        (days / name).write_bytes(content_)
    proxy.requests.clear()
    dataset = open_dataset(days, f"{day(0)}..{day(1)}")
    requests = [f"{method} {path}" for method, path in proxy.requests]
    assert len(dataset.manifest.shards) > 8
    assert not [request for request in requests if "part-" in request]
    assert len(requests) < 30
    here = open_dataset(disk, f"{day(0)}..{day(1)}")
    assert dataset.encoders_id == here.encoders_id
    assert dataset.encoders.vocabularies["goods_brand"].equals(here.encoders.vocabularies["goods_brand"])
    inspect.main([str(days / day(1)), "--verify"])
    printed = capsys.readouterr().out.splitlines()
    verified = [line.removeprefix("verified  ") for line in printed if line.startswith("verified")]
    assert verified == [*verify(Dataset(disk / day(1)))]
    assert f"page      {days / day(1)}.card.html" in printed
    shard = days / day(0) / dataset.manifest.shards[0].path.partition("/")[2]
    asked: list[str] = []

    def refuse_again(method: str, path: str) -> int | None:
        asked.extend([path] if method == "GET" and path.endswith(shard.name) else [])
        return 403 if len(asked) > 3 else None

    proxy.fault = refuse_again  # its checksums are right; then the token expires
    with pytest.raises(UserError, match=r"cannot be read \(.*refuses.*Run the same command again") as refused:
        list(verify(Dataset(days / day(0))))
    assert "Restore" not in str(refused.value)
    proxy.fault = lambda method, path: None
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"^{shard} has \d+ bytes, the manifest says \d+"):
        open_dataset(days, day(0))
    shard.unlink()
    with pytest.raises(UserError, match=rf"^{shard} is missing"):
        open_dataset(days, day(0))


def test_an_out_on_a_store_is_replaced_only_on_demand_and_only_if_it_is_a_dataset(memory, small_log, small_content):
    out = memory / "out"
    run(small_log, out, small_content())
    before = on(out)
    with pytest.raises(UserError, match=rf"^{out} exists\. Choose another out="):
        run(small_log, out, small_content())
    run(small_log, out, small_content(), seed=1, overwrite=True)
    assert on(out).keys() == before.keys()
    assert on(out) != before
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is no dataset, and overwrite=true replaces only datasets"):
        run(small_log, out, small_content(), overwrite=True)
    assert (out / "schema.yaml").is_file()
    assert [path.name for path in memory.iterdir()] == ["out"]


@pytest.mark.parametrize("store", ["memory", "s3"], indirect=True)
def test_a_batch_of_many_is_read_alone_and_an_index_once(store: StorePath, monkeypatch):
    def table_of(rows: int) -> pa.Table:
        lists = pa.array([[i] * i for i in range(rows)], pa.large_list(pa.int64()))
        return pa.table(
            {"key": pa.array([f"k{i}" for i in range(rows)], pa.string()), "x": np.arange(rows), "l": lists}
        )

    tables = [table_of(rows) for rows in (0, 3, 500, 7)]
    coded = [table.set_column(0, "key", table["key"].dictionary_encode()) for table in tables]
    asked: list[tuple[int, int | None]] = []
    whole = batch_objects._ranges

    def ranges(paths: Any, starts: Any, stops: Any) -> list[bytes]:
        asked.extend(zip(starts, stops, strict=True))
        return whole(paths, starts, stops)

    monkeypatch.setattr(batch_objects, "_ranges", ranges)
    monkeypatch.setattr(batch_objects, "TAIL_BYTES", 40)  # less than an index has
    for kind in (tables, coded[1:]):
        paths = [shuffle.write(store / f"{number}", kind) for number in range(3)]
        batch_objects._known.clear()
        asked.clear()
        assert shuffle.read(paths[0]).equals(kind[0])
        for batch, table in enumerate(kind):
            assert all(found.equals(table) for found in shuffle.read_each(paths, [batch] * 3))
        sizes = [stop - start for start, stop in asked if stop is not None]
        assert len(asked) - len(sizes) == 6  # an index, and one more request for the rest of it, each
        assert len(sizes) == 3 * len(kind)
        assert sum(sizes) < 3 * (store / "0").stat().st_size
        monkeypatch.setattr(batch_objects, "TAIL_BYTES", 1 << 16)  # the last batch, too
        batch_objects._known.clear()
        asked.clear()
        assert all(found.equals(kind[-1]) for found in shuffle.read_each(paths, [len(kind) - 1] * 3))
        assert len(asked) == 3
        monkeypatch.setattr(batch_objects, "TAIL_BYTES", 40)


def test_raw_files_are_read_on_where_a_store_stopped_answering(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch
):
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "20")
    rows = b"".join(b"%d\n" % number for number in range(100_000))
    (through_proxy / "a.csv").write_bytes(rows)
    [file] = find(str(through_proxy), "*.csv")
    with open_raw(file.path, cache="none") as raw:
        first = raw.read(1000)
        proxy.fail("reset", 8)  # more than the client itself repeats a request
        assert first + raw.read(300_000) + raw.read() == rows
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.1")
    proxy.stop()
    with pytest.raises(
        UserError, match=rf"^{through_proxy}: the store has not answered for 0.1 s: .*\. Run again once it does\.$"
    ):
        find(str(through_proxy), "*.csv")


def test_a_log_is_generated_on_a_store_as_on_disk(memory: StorePath, tmp_path):
    first, second = (LogConfig(impressions=400, days=1, start=start) for start in ("2026-11-01", "2026-11-02"))
    for out in (memory / "raw", tmp_path / "raw"):
        assert on_store(out) == (out != tmp_path / "raw")
        for config in (first, second):
            generate(config, out)
    assert on(memory / "raw") == on(tmp_path / "raw")
    assert len(re.findall("impressions", str(on(memory / "raw").keys()))) == 2


def test_of_a_state_on_a_store_only_the_row_groups_of_a_bucket_are_fetched(memory: StorePath, tmp_path, monkeypatch):
    rng, groups = np.random.default_rng(0), 8
    columns = pa.schema(
        [("key", pa.string()), ("known", pa.int64()), ("value", pa.float64()), ("weight", pa.float64())]
    )
    with pq.ParquetWriter(tmp_path / "ctr.parquet", columns, write_page_checksum=True) as writer:
        for _ in range(groups):
            rows = 100_000
            keys, known = pa.array(["k"] * rows), pa.array(rng.integers(1 << 60, size=rows))
            writer.write_table(pa.table([keys, known, rng.random(rows), rng.random(rows)], schema=columns))
    content = (tmp_path / "ctr.parquet").read_bytes()
    (memory / "ctr.parquet").write_bytes(content)
    entry = StateFile(
        path="ctr.parquet",
        bytes=len(content),
        sha256="0" * 64,
        name="ctr",
        definition="0" * 16,
        row_groups=[100_000] * groups,
    )
    fetched: list[int] = []
    ranges = type(memory.system).cat_ranges

    def counted(system, paths, starts, ends, **options):
        fetched.extend(end - start for start, end in zip(starts, ends, strict=True))
        return ranges(system, paths, starts, ends, **options)

    monkeypatch.setattr(type(memory.system), "cat_ranges", counted)
    with opened(memory, entry, columns, [3, 4]) as parquet:
        assert parquet.read_row_groups([3, 4]).equals(pq.ParquetFile(tmp_path / "ctr.parquet").read_row_groups([3, 4]))
    assert len(content) / 4 < sum(fetched) < len(content) / 2
    damaged = bytearray(content)
    damaged[pq.read_metadata(tmp_path / "ctr.parquet").row_group(3).column(1).data_page_offset + 5] ^= 255
    (memory / "ctr.parquet").write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=rf"^{memory}/ctr.parquet"), opened(memory, entry, columns, [3, 4]) as parquet:
        parquet.read_row_groups([3, 4])
