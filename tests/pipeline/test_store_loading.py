"""Loading from a store: the same batches as from a disk, by few requests, in bounded memory, whatever becomes of the store."""

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import FaultProxy
from test_loader import make_dataset, same

from features.batch import Batch
from features.errors import UserError
from features.parquet_pages import chunk_start
from pipeline.dataset import read_ahead, split_reader
from pipeline.dataset.background import delayed
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import DELAY, Loader, StoreGoneError
from pipeline.dataset.read_ahead import Fetched, ReadAhead, Reading, StoredGroups
from pipeline.dataset.shards import open_shard
from pipeline.dataset.split_reader import SplitReader
from pipeline.storage import ranges
from pipeline.storage.store_path import StorePath, place

MAKING = {"rows": 500, "row_group": 16, "shard_rows": 130}
ROW_GROUPS, SHARDS = 34, 4
SETTINGS: dict[str, Any] = {"seed": 3, "window": 24}


def copied(dataset: Dataset, root: Path) -> Dataset:
    for file in dataset.path.rglob("*"):
        if file.is_file():
            (root / file.relative_to(dataset.path).as_posix()).write_bytes(file.read_bytes())
    return Dataset(root)


def every_batch(loader: Loader, epoch: int = 0, done: int = 0) -> list[Batch]:
    return list(loader.batches(loader.after(loader.start(epoch), done)))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("local") / "data", **MAKING)


@pytest.fixture(scope="module")
def stored(local: Dataset) -> Dataset:
    return copied(local, place("memory://stored-for-loading"))


@pytest.fixture
def requests(stored: Dataset, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File, begin and end of what is read of shards."""
    asked: list[tuple[str, int, int]] = []
    system = type(stored.path.system)  # type: ignore[attr-defined]
    cat_file = system.cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **named: Any) -> bytes:
        if path.endswith(".parquet"):
            asked.append((path.rpartition("/")[2], start or 0, end or 0))
        return cat_file(self, path, start, end, **named)

    monkeypatch.setattr(system, "cat_file", counted)
    return asked


class Counted(Loader):
    """Counts what is decoded, and what was fetched ahead for it."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.fetched, self.decoded = Counter[int](), Counter[int]()

    def decode(self, group: int, ahead: ReadAhead | None = None) -> Any:
        self.decoded[group] += 1
        if ahead is not None:
            assert group in [found for found, *_ in ahead.ahead]  # was foreseen
        return super().decode(group, ahead)

    def _fetch(self, group: int) -> Fetched:
        self.fetched[group] += 1
        return super()._fetch(group)


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_batches_are_those_of_a_disk_bit_for_bit_and_each_row_group_is_fetched_as_it_is_decoded(
    local: Dataset, stored: Dataset, data: st.DataObject
) -> None:
    lanes = data.draw(st.sampled_from([1, 2, 4, 8]), label="lanes")
    ranks = data.draw(st.sampled_from([1, 2, 3, 4]), label="ranks")
    arguments: dict[str, Any] = {
        "lanes": lanes, "ranks": ranks, "rank": data.draw(st.integers(0, ranks - 1), label="rank"), "seed": 3,
        "window": data.draw(st.sampled_from([0, 1, 5, 24, 200]), label="window"),
    }  # fmt: skip
    limit = data.draw(st.sampled_from([1, 3000, 1 << 20]), label="bytes ahead")
    loader = Counted(stored, "train", 16, **arguments, reading=Reading(limit))
    other = Loader(local, "train", 16, **arguments)
    epoch, done = data.draw(st.integers(0, 1), label="epoch"), data.draw(st.integers(0, 31), label="done")
    found, wanted = every_batch(loader, epoch, done), every_batch(other, epoch, done)
    assert len(found) == len(wanted)
    assert all(map(same, found, wanted))
    assert loader.fetched == loader.decoded


def test_a_shard_costs_a_request_for_its_footer_and_one_for_each_row_group(
    stored: Dataset, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "OPEN_SHARDS", 1)  # a footer is kept when its shard is closed
    ends = {(Path(shard.path).name, shard.bytes) for shard in stored.shards("train")}
    loader = Counted(stored, "train", 16, 4, **SETTINGS)
    every_batch(loader)
    assert Counter((file, end) for file, _, end in requests if (file, end) in ends) == dict.fromkeys(ends, 1)
    assert len(requests) == SHARDS + loader.decoded.total()


def test_far_columns_are_two_requests_and_near_ones_are_one(
    local: Dataset, stored: Dataset, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = local.shards("train")[0]
    wanted = open_shard(local, shard).read(["x", "weight"])
    for gap, count in [(1 << 20, 1), (0, 2 * len(shard.row_groups))]:
        requests.clear()
        monkeypatch.setattr(ranges.coalesced, "__defaults__", (gap,))
        with open_shard(stored, shard, ["x", "weight"]) as file:
            assert file.read(["x", "weight"]).equals(wanted)
        assert len(requests) == 1 + count  # and the footer
        if not gap:
            assert sum(end - start for _, start, end in requests[1:]) < shard.bytes / 2


def test_a_reader_of_a_split_and_of_shards_is_the_same_on_a_store(
    local: Dataset, stored: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_reader, "table_sizes", lambda _: {})  # these datasets have no encoders
    for rank in range(2):
        found, wanted = (list(SplitReader(data, "train", 50, rank, 2).batches()) for data in (stored, local))
        assert len(found) == len(wanted)
        assert all(map(same, found, wanted))
    assert same(SplitReader(stored, "train", 50).empty(), SplitReader(local, "train", 50).empty())
    for shard in local.shards("train"):
        with open_shard(local, shard) as one, open_shard(stored, shard) as other:
            assert one.read().equals(other.read())
        with open_shard(local, shard, ["b"], [0]) as one, open_shard(stored, shard, ["b"], [0]) as other:
            assert one.read_row_group(0, ["b"]).equals(other.read_row_group(0, ["b"]))


# Damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("page", "cannot be read"), ("footer", "its footer is not the manifest's"), ("cut", "ends before byte"),
        ("gone", "No such file"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_left_out_or_refused_as_on_a_disk(
    damage: str, says: str, local: Dataset, tmp_path: Path, memory: StorePath, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_dataset(tmp_path / "data", **MAKING)
    other = copied(data, memory)
    shard = data.shards("train")[2]
    content = bytearray((data.path / shard.path).read_bytes())
    content[60 if damage == "page" else -20] ^= 8
    for path in (data.path / shard.path, other.path / shard.path):
        path.write_bytes(content[:-100] if damage == "cut" else content)
        if damage == "gone":
            path.unlink()
    strict = Loader(other, "train", 16, 4, **SETTINGS)
    with pytest.raises(UserError, match=f"part-00002-of-00004.parquet, row group .*{says}"):
        every_batch(strict)
    skipping = [Loader(each, "train", 16, 4, **SETTINGS, max_corrupt=0.5) for each in (data, other)]
    if damage == "gone":
        with pytest.raises(UserError, match="No such file"):
            every_batch(skipping[1])
        return
    with caplog.at_level(logging.WARNING):
        wanted, found = (every_batch(loader) for loader in skipping)
    assert all(map(same, found, wanted))
    assert skipping[0].corrupt == skipping[1].corrupt != set()


@pytest.mark.parametrize("reader", ["loader", "open_shard"])
def test_a_lying_page_of_a_list_is_found_before_it_is_unpacked(reader: str, tmp_path: Path, memory: StorePath) -> None:
    data = make_dataset(tmp_path / "data", **MAKING)
    shard = data.shards("train")[1]
    group = pq.read_metadata(data.path / shard.path).row_group(2)
    (chunk,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith("b."))
    content = bytearray((data.path / shard.path).read_bytes())
    content[chunk_start(chunk) : chunk_start(chunk) + 4] = b"\xff" * 4
    (data.path / shard.path).write_bytes(content)
    other = copied(data, memory)
    loader = Loader(other, "train", 16, 4, **SETTINGS, max_corrupt=0.9)
    readers = {"loader": lambda: every_batch(loader), "open_shard": lambda: open_shard(other, shard)}
    with pytest.raises(UserError, match=r"part-00001.*column b\..* has a page without a valid header"):
        readers[reader]()
    with open_shard(other, shard, ["x"]) as file:  # which does not read it
        assert file.read(["x"]).num_rows == shard.rows


# Memory


def test_what_is_ahead_keeps_to_its_limit_and_comes_in_order() -> None:
    sizes_ = {group: 1 + group * 7 % 10 for group in range(200)}
    held, most, lock = Counter[int](), 0, threading.Lock()

    def fetch(group: int) -> Any:
        nonlocal most
        with lock:
            held[group] = sizes_[group]
            most = max(most, held.total())
        time.sleep(0.0005 * (group % 3))
        return group

    ahead = ReadAhead(fetch, sizes_.__getitem__, iter(range(200)), 40)
    for group in range(200):
        if group == 50:
            continue  # one that is not taken is dropped
        assert ahead.take(group) == group
        with lock:
            for earlier in [other for other in held if other < group]:
                del held[earlier]
            assert held.total() <= 40
    assert ahead.take(50) == 50  # not foreseen
    ahead.close()
    assert 25 < most <= 50  # with the one that the test has just given back


def test_a_row_group_larger_than_the_limit_is_read_all_the_same_and_threads_end_with_their_epoch(
    stored: Dataset,
) -> None:
    loader = Loader(stored, "train", 16, 4, **SETTINGS, reading=Reading(1))
    batches = loader.batches(loader.start())
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(every_batch(loader)) == 32
    end = time.monotonic() + 5
    while any(thread.name == "read ahead" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_memory_of_a_shard_is_given_back_once_a_row_group_is_decoded(local: Dataset, memory: StorePath) -> None:
    data = copied(local, memory)
    shard = data.shards("train")[0]
    groups = StoredGroups(data, ["x"], Reading())
    opened, parts = groups.fetch(shard, 1)
    assert (
        sum(len(content) for _, content in parts) < groups.bytes_of(shard, 1) < 10 * shard.bytes
    )  # a footer is parsed
    with opened.holding(parts) as content:
        assert content[parts[0][0][0]] == parts[0][1][0]
        assert any(content[:])
        table = opened.file.read_row_group(1, ["x"])
    assert not any(opened.content[:])
    assert table["x"].to_pylist() == [float(n) for n in range(16, 32)]  # the table does not lie in it


def test_footers_that_are_kept_take_a_quarter_of_the_limit_at_most(stored: Dataset) -> None:
    def kept(limit: int) -> list[int]:
        groups = StoredGroups(stored, ["x"], Reading(limit))
        for shard in stored.shards("train"):
            assert groups.fetch(shard, 0).parts
        return [len(footer) for footer in groups.footers.values()]

    sizes = kept(1 << 20)
    assert len(sizes) == SHARDS
    assert kept(4 * (sum(sizes) - 1)) == sizes[1:]
    assert kept(4) == []


# The cache


def test_a_second_run_reads_all_from_the_cache_and_what_is_damaged_there_from_the_store(
    stored: Dataset, local: Dataset, requests: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading = Reading(cache=tmp_path / "cache", cache_bytes=1 << 22)
    wanted = every_batch(Loader(local, "train", 16, 4, **SETTINGS))
    assert all(map(same, every_batch(Loader(stored, "train", 16, 4, **SETTINGS, reading=reading)), wanted))
    assert len([*(tmp_path / "cache").iterdir()]) == ROW_GROUPS + SHARDS
    requests.clear()
    assert all(map(same, every_batch(Loader(stored, "train", 16, 4, **SETTINGS, reading=reading)), wanted))
    assert not requests
    for file in [*(tmp_path / "cache").iterdir()][:3]:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert all(map(same, every_batch(Loader(stored, "train", 16, 4, **SETTINGS, reading=reading)), wanted))
    assert 3 == len(requests) == caplog.text.count("damaged")


# A store that fails


def test_an_outage_is_survived_and_a_store_that_stays_away_is_known_two_batches_ahead(
    stored: Dataset, local: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = every_batch(Loader(local, "train", 16, 4, **SETTINGS))
    system = type(stored.path.system)  # type: ignore[attr-defined]
    cat_file, calls, out_until = system.cat_file, [0], [float("inf")]

    def failing(self: Any, path: str, *arguments: Any, **named: Any) -> bytes:
        calls[0] += 1
        if 20 < calls[0] <= out_until[0]:
            raise OSError(errno.EIO, "gone")
        return cat_file(self, path, *arguments, **named)

    monkeypatch.setattr(system, "cat_file", failing)
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.3")
    loader = Loader(stored, "train", 16, 4, **SETTINGS, max_corrupt=0.9, reading=Reading(1))
    found: list[tuple[Batch, bool]] = []
    batches = ((batch, loader.gone is not None) for batch in loader.batches(loader.start()))
    says = r"memory://.*: the store has not answered for 0.3 s: .*same command resumes"
    with pytest.raises(StoreGoneError, match=says):
        found.extend(batches)
    assert 0 < len(found) < len(wanted)
    assert all(map(same, (batch for batch, _ in found), wanted))
    assert [known for _, known in found] == [False] * (len(found) - DELAY) + [True] * DELAY
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "20")
    calls[0], out_until[0] = 0, 40
    assert all(map(same, every_batch(Loader(stored, "train", 16, 4, **SETTINGS)), wanted))
    assert calls[0] > 40


def test_delayed_items_are_all_of_them_in_order_and_only_errors_of_users_wait() -> None:
    def items(count: int, error: Exception | None) -> Iterator[Any]:
        yield from range(count)
        if error:
            raise error

    for count in range(5):
        seen: list[UserError] = []
        assert [*delayed(items(count, None), 2, seen.append)] == [*range(count)]
        found = delayed(items(count, UserError("x")), 2, seen.append)
        for taken in range(count):
            assert next(found) == taken
            assert bool(seen) == (taken + 2 >= count), "known once fewer than two later ones are left"
        with pytest.raises(UserError):
            next(found)
        assert len(seen) == 1


@pytest.mark.system
def test_decoding_processes_read_from_s3_while_its_server_is_gone_for_a_while(
    local: Dataset, through_proxy: StorePath, proxy: FaultProxy, tmp_path: Path
) -> None:
    wanted = every_batch(Loader(local, "train", 16, 8, **SETTINGS))
    data = copied(local, through_proxy)
    reading = Reading(ahead_bytes=2000, cache=tmp_path / "cache")
    loader = Loader(data, "train", 16, 8, **SETTINGS, workers=2, reading=reading)
    assert loader.decoders is not None
    loader.decoders.slots = 2
    batches = loader.batches(loader.start())
    found = [next(batches)]
    asked = len(proxy.requests)
    proxy.stop()
    threading.Timer(1.0, proxy.start).start()
    assert all(map(same, chain(found, batches), wanted))
    assert len(proxy.requests) > asked  # some of the rows came later
    assert len([*(tmp_path / "cache").iterdir()]) == ROW_GROUPS + SHARDS
    loader.decoders.close()
