"""The order of rows against what it promises: nothing lost, nothing twice, the same for every number of ranks."""

import gc
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_from_rows import write_dataset
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import PADDING, Batch, Rows
from features.errors import UserError
from features.fit.encoders import arrow_schema
from features.schema.schema import Schema
from pipeline.dataset import loader as loader_module
from pipeline.dataset import shards as shards_module
from pipeline.dataset.background import in_background
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.decoding import split
from pipeline.dataset.lanes import shares
from pipeline.dataset.loader import Loader, Position
from pipeline.dataset.verify import verify

SCHEMA = Schema.parse(
    {
        "source": {"files": "*.csv"},
        "dense": {"x": {}},
        "bag": {"b": {}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "split": {"by": "hash", "key": "k", "valid": 0.1, "test": 0.1},
    },
    "small.yaml",
)


def make_dataset(out: Path, rows: int, row_group: int, shard_rows: int) -> Dataset:
    """Rows whose x is their row_id, and whose bag holds it row_id % 3 times."""
    table = pa.Table.from_pylist(
        [
            {"x": float(i), "b": [i] * (i % 3), "label.click": i % 2, "weight": 1.0, "event_time": 0, "row_id": i}
            for i in range(rows)
        ],
        schema=arrow_schema(SCHEMA),
    )
    return write_dataset(out, SCHEMA, {"train": table}, row_group, shard_rows)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", rows=500, row_group=16, shard_rows=130)


def ids(batch: Batch) -> list[int]:
    """The rows of a batch, padding apart; their cells must have travelled with them."""
    real = batch.row_id_B != PADDING
    assert batch.dense_BD[real, 0].tolist() == batch.row_id_B[real].tolist()
    for row, bag in zip(batch.row_id_B.tolist(), batch.sparse["b"].to_dense(), strict=True):
        assert bag.tolist() == ([row] * (row % 3) if row != PADDING else [])
    return batch.row_id_B[real].tolist()


def epoch(loader: Loader, position: Position) -> list[list[int]]:
    return [ids(batch) for batch in loader.batches(position)]


def same(some: Batch, other: Batch) -> bool:
    """Whether two batches are equal, bit for bit."""
    values = [
        (batch.sparse.values(), batch.sparse.lengths(), *(getattr(batch, f.name) for f in fields(batch)[1:]))
        for batch in (some, other)
    ]
    pairs = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*values, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def loader_threads() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


def by_hand(
    dataset: Dataset, days: list[int], lanes: int, share: int, window: int, seed: int, epoch: int
) -> list[list[int]]:
    """The rows of each global batch in order, written from the definition; PADDING where a lane has ended."""
    files = [pq.ParquetFile(dataset.path / shard.path) for shard in dataset.shards("train")]
    groups = [
        (day, file.read_row_group(g)["row_id"].to_pylist())
        for day, file in zip(days, files, strict=True)
        for g in range(file.num_row_groups)
    ]
    shuffle = np.random.default_rng([seed, epoch])
    read: list[list[int]] = [[] for _ in range(lanes)]
    windows = [0] * lanes
    for day in sorted(set(days)):
        places = [place for place, (of, _) in enumerate(groups) if of == day]
        places = shuffle.permutation(places).tolist() if window else places
        flat = [row for place in places for row in groups[place][1]]
        for lane in range(lanes):
            left = flat[len(flat) * lane // lanes : len(flat) * (lane + 1) // lanes]
            if not window:
                read[lane] += left
                continue
            first = max(1, window * (lane + 1) // lanes)
            while left or first:
                rows, left = left[: first or window], left[first or window :]
                mixed = np.random.default_rng([seed, epoch, lane, windows[lane]]).permutation(len(rows))
                read[lane] += [rows[i] for i in mixed]
                windows[lane], first = windows[lane] + 1, 0
    steps = max(-(-len(rows) // share) for rows in read)
    full = [rows + [PADDING] * (steps * share - len(rows)) for rows in read]
    return [[row for rows in full for row in rows[s * share : (s + 1) * share]] for s in range(steps)]


def of_rank(batch: list[int], lanes: int, rank: int, ranks: int) -> list[int]:
    """A rank's rows of a global batch."""
    size = len(batch) // lanes
    own = [row for lane in range(rank, lanes, ranks) for row in batch[lane * size : (lane + 1) * size]]
    if lanes % ranks:
        own = batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]
    return [row for row in own if row != PADDING]


@settings(max_examples=examples(60), deadline=None)
@given(
    rows=st.integers(1, 120),
    row_group=st.integers(1, 40),
    shard_rows=st.integers(5, 70),
    lanes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    share=st.integers(1, 20) | st.integers(21, 400),
    window=st.integers(0, 30),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_every_row_once_an_epoch_in_the_same_global_batches_on_any_ranks_and_from_any_step(
    rows: int, row_group: int, shard_rows: int, lanes: int, share: int, window: int, seed: int, data: st.DataObject
) -> None:
    batch_size = share * lanes
    any_ranks = st.sampled_from([r for r in range(1, lanes + 1) if lanes % r == 0]) | st.integers(1, batch_size)
    with TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder) / "data", rows, row_group, shard_rows)
        shards = [shard.path for shard in dataset.shards("train")]
        days = sorted(data.draw(st.lists(st.integers(1, 2), min_size=len(shards), max_size=len(shards)), label="days"))
        dataset.day_of = lambda shard: f"2026-11-0{days[shards.index(shard.path)]}"
        epoch = data.draw(st.integers(0, 2), label="epoch")
        whole = by_hand(dataset, days, lanes, share, window, seed, epoch)
        assert Counter(row for batch in whole for row in batch if row != PADDING) == Counter(range(rows))

        alone = Loader(dataset, "train", batch_size, lanes, seed, window=window)
        done = 0
        for _ in range(2):  # from the start, and gone on with on other ranks
            ranks = data.draw(any_ranks, label="ranks")
            position = alone.after(alone.start(epoch), done)
            some = (
                range(ranks)
                if ranks <= 8
                else {0, ranks - 1, *data.draw(st.lists(st.integers(0, ranks - 1), max_size=3))}
            )
            for rank in some:
                loader = Loader(dataset, "train", batch_size, lanes, seed, rank, ranks, window=window, ahead=2)
                batches = list(loader.batches(position))
                assert [ids(batch) for batch in batches] == [of_rank(b, lanes, rank, ranks) for b in whole[done:]]
                assert {len(batch.row_id_B) for batch in batches} <= {-(-batch_size // ranks)}
                assert loader.steps(position) == len(batches)
            parts = [loader.rows_of(position, some) for some in split(loader.shares, data.draw(st.integers(1, 5)))]
            together = [Rows.concat(rows).batch(SCHEMA, loader.size) for rows in zip(*parts, strict=True)]
            assert list(map(same, together, batches)) == [True] * len(together) == [True] * len(batches)
            done = data.draw(st.integers(0, len(whole)), label="steps done")

        stepwise = alone.start(epoch)
        for _ in range(done):
            stepwise = alone.after(stepwise)
        assert stepwise == alone.after(alone.start(epoch), done)
        assert sum(stepwise.cursors) == sum(row != PADDING for batch in whole[:done] for row in batch)


@pytest.mark.parametrize("ranks", [3, 7, 150])
def test_windows_without_a_row_of_a_rank_keep_the_places_of_the_others(dataset: Dataset, ranks: int) -> None:
    whole = by_hand(dataset, [1] * len(dataset.shards("train")), lanes=2, share=100, window=24, seed=0, epoch=0)
    for done in range(3):
        for rank in (0, ranks // 2, ranks - 1):
            loader = Loader(dataset, "train", 200, 2, rank=rank, ranks=ranks, window=24)
            wanted = [of_rank(batch, 2, rank, ranks) for batch in whole[done:]]
            assert epoch(loader, loader.after(loader.start(), done)) == wanted


@settings(max_examples=examples(60), deadline=None)
@given(lanes=st.integers(1, 64), size=st.integers(1, 64), data=st.data())
def test_every_place_of_a_batch_belongs_to_one_rank_of_any_number_up_to_4096(
    lanes: int, size: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.integers(1, lanes) | st.integers(1, lanes * size), label="ranks")
    owned = [
        [
            share.lane * size + p
            for share in shares(lanes * size, lanes, rank, ranks)
            for p in range(share.start, share.stop)
        ]
        for rank in range(ranks)
    ]
    assert sorted(place for places in owned for place in places) == list(range(lanes * size))
    assert {len(places) for places in owned} <= {lanes * size // ranks, -(-lanes * size // ranks)}


def test_padding_is_in_the_last_batches_only_and_differs_by_less_than_a_row_a_lane(dataset: Dataset) -> None:
    loaders = [Loader(dataset, "train", 48, 12, rank=rank, ranks=3, window=20) for rank in range(3)]
    sizes = [[len(batch) for batch in epoch(loader, loader.start())] for loader in loaders]
    assert {len(s) for s in sizes} == {11}  # the longest lane has 42 rows, and gives 4 a batch
    assert all(size == 16 for s in sizes for size in s[:-1])
    assert max(s[-1] for s in sizes) - min(s[-1] for s in sizes) <= 4


def test_epochs_differ_and_a_seed_gives_the_same_order_again(dataset: Dataset) -> None:
    def order(seed: int, number: int) -> list[list[int]]:
        loader = Loader(dataset, "train", 40, 4, seed, window=64)
        return epoch(loader, loader.start(number))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_an_epoch_is_mixed_across_row_groups_and_within_a_window(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 40, 4, window=64)
    seen = [row for batch in epoch(loader, loader.start()) for row in batch]
    neighbours = sum(abs(a - b) == 1 for a, b in zip(seen, seen[1:], strict=False))
    assert neighbours < 20
    assert len({row // 16 for row in seen[:40]}) > 8


@pytest.mark.parametrize("batch_size", [1, 7, 500, 600])
def test_evaluation_reads_in_the_order_of_the_dataset(dataset: Dataset, batch_size: int) -> None:
    loader = Loader(dataset, "train", batch_size)
    assert flat(epoch(loader, loader.start())) == list(range(500))
    assert flat(epoch(loader, loader.start(3))) == list(range(500))


def test_two_epochs_at_once_do_not_disturb_each_other(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 40, 4, window=64)
    alone = [epoch(loader, loader.start(number)) for number in range(2)]
    pairs = zip(loader.batches(loader.start(0)), loader.batches(loader.start(1)), strict=True)
    assert [list(batches) for batches in zip(*((ids(a), ids(b)) for a, b in pairs), strict=True)] == alone


def test_row_groups_are_decoded_by_several_threads_at_once(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 40)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda group: len(loader.decode(group)), [*range(len(loader.groups))] * 40))
    assert found == loader.group_rows.tolist() * 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"split": "valid"}, "split valid is empty"),
        (
            {"lanes": 4, "ranks": 9},
            "batch_size=8 leaves some of the 9 ranks without a row: set train.batch_size to 9 or more",
        ),
        ({"batch_size": 6, "lanes": 4}, "batch_size=6 must be divisible by lanes=4"),
    ],
)
def test_sizes_that_do_not_divide_and_empty_splits_are_refused(dataset: Dataset, arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Loader(dataset, **({"split": "train", "batch_size": 8} | arguments))


def test_a_position_of_other_lanes_is_refused(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 8, 4)
    with pytest.raises(UserError, match=r"the run reads 2 lanes, train\.lanes=4"):
        next(loader.batches(Position(0, [0, 0])))


# Damage


@pytest.mark.integration
def test_a_flipped_bit_anywhere_in_the_pages_of_a_shard_never_gives_other_rows(tmp_path: Path) -> None:
    """Refused by name, or in statistics of page headers and a column that is not read."""
    assert damaged(tmp_path, lambda size, footer: range(size - footer)) > 0.5


@pytest.mark.integration
def test_a_flipped_bit_in_a_footer_is_refused_by_name_or_changes_nothing_that_is_read(tmp_path: Path) -> None:
    """Parquet has no checksum of the footer: a flipped offset of a column may still show it as another one."""
    assert damaged(tmp_path, lambda size, footer: range(size - footer, size)) > 0.9


def damaged(folder: Path, places: Callable[[int, int], range], silent: int = 0) -> float:
    """Flips one bit of each byte in turn: the share that is refused. At most `silent` others may give other rows."""
    dataset = make_dataset(folder / "data", rows=40, row_group=10, shard_rows=20)
    file = dataset.path / dataset.shards("train")[1].path
    good = file.read_bytes()
    tried = places(len(good), int.from_bytes(good[-8:-4], "little") + 8)
    refused = other = 0
    for place in tried:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        loader = Loader(dataset, "train", 8)
        try:
            other += cells(loader) != list(range(40))
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017
            refused += 1
    assert other <= silent
    return refused / len(tried)


def cells(loader: Loader) -> list[int]:
    """The row_ids of an epoch, -2 where a cell is not its row's."""
    found = []
    for batch in loader.batches(loader.start()):
        bags = batch.sparse["b"].to_dense()
        for b, row in enumerate(batch.row_id_B.tolist()):
            good = batch.dense_BD[b].tolist() == [row] and bags[b].tolist() == [row] * (row % 3)
            good &= bool(batch.observed_BT[b].all()) and batch.label_BT[b].tolist() == [row % 2]
            found.append(row if good and batch.weight_BT[b].tolist() == [1.0] else -2)
    return found


def test_a_flipped_bit_in_a_page_names_file_and_row_group(dataset: Dataset) -> None:
    file = dataset.path / dataset.shards("train")[2].path
    bad = bytearray(file.read_bytes())
    bad[60] ^= 8
    file.write_bytes(bad)
    loader = Loader(dataset, "train", 20, 2, window=30)
    with pytest.raises(UserError, match=rf"{file.name}, row group 0: cannot be read"):
        epoch(loader, loader.start())
    assert loader_threads() == 0


def test_a_shard_that_is_shorter_or_missing_is_refused_on_opening(dataset: Dataset) -> None:
    file = dataset.path / dataset.shards("train")[1].path
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{file.name} has {len(content) - 1} bytes, the manifest says {len(content)}"):
        Dataset(dataset.path)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        Dataset(dataset.path)


def test_a_shard_that_vanishes_after_opening_is_named(dataset: Dataset) -> None:
    shutil.rmtree(dataset.path / "train")
    loader = Loader(dataset, "train", 20)
    with pytest.raises(UserError, match=r"part-00000-of-00004\.parquet, row group 0: cannot be read"):
        epoch(loader, loader.start())


def test_verify_finds_a_byte_that_no_page_checksum_covers(dataset: Dataset) -> None:
    with pytest.raises(UserError, match="encoders cannot be read"):  # it has none; its shards are whole
        list(verify(dataset))
    file = dataset.path / dataset.shards("train")[0].path
    bad = bytearray(file.read_bytes())
    bad[-20] ^= 1
    file.write_bytes(bad)
    with pytest.raises(UserError, match=f"{file.name}: checksum"):
        list(verify(Dataset(dataset.path)))


# The thread


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_iterator_that_is_dropped_leaves_no_thread(dataset: Dataset, taken: int) -> None:
    loader = Loader(dataset, "train", 4, 4, window=64, ahead=2)
    batches = loader.batches(loader.start())
    for _ in range(taken):
        next(batches)
    del batches
    gc.collect()
    assert loader_threads() == 0


def test_an_error_in_the_thread_reaches_the_caller_after_the_batches_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    batches = in_background(items(), 4)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(batches)
    assert loader_threads() == 0


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_batches_than_asked_for_are_made_ahead(ahead: int) -> None:
    made = []

    def items() -> Iterator[int]:
        for index in range(100):
            made.append(index)
            yield index

    batches = in_background(items(), ahead)
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < ahead + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == ahead + 2  # one is used, `ahead` wait, one is about to
    batches.close()


# Memory and work


class Watched(Loader):
    """Counts the row groups that are decoded, and those that are alive at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.decoded: list[int] = []
        self.alive: weakref.WeakSet[Watched.Group] = weakref.WeakSet()
        self.most = 0

    class Group(Rows):
        __hash__ = object.__hash__

    def decode(self, group: int, *ahead: None) -> Rows:
        rows = super().decode(group)
        rows = Watched.Group(*(getattr(rows, f.name) for f in fields(rows)))
        self.decoded.append(group)
        self.alive.add(rows)
        self.most = max(self.most, len(self.alive))
        return rows


def test_only_the_row_groups_of_a_window_are_held(dataset: Dataset) -> None:
    loader = Watched(dataset, "train", 8, 1, window=32, ahead=1)  # two or three row groups of 16 rows
    epoch(loader, loader.start())
    assert len(loader.decoded) <= len(loader.groups) + 2
    assert loader.most <= 6  # of this window and of the one before


@pytest.mark.parametrize("done", [0.5, 0.99])
def test_a_run_that_goes_on_decodes_only_what_is_left(dataset: Dataset, done: float) -> None:
    loader = Watched(dataset, "train", 30, 3, window=32, ahead=1)  # lanes of 166, 167 and 167 rows, 10 of each a batch
    position = loader.after(loader.start(), int(loader.steps(loader.start()) * done))
    left = loader.rows - sum(position.cursors)
    assert left > 0
    epoch(loader, position)
    assert len(loader.decoded) <= left / 16 + 3 * 5


def test_a_lane_that_has_ended_is_not_read_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", rows=481, row_group=4, shard_rows=500)
    loader = Watched(dataset, "train", 20, 2, window=16, ahead=1)  # lanes of 240 and 241 rows
    epoch(loader, loader.after(loader.start(), 24))  # one row is left
    assert len(loader.decoded) <= 10


def test_one_of_4096_ranks_decodes_only_the_row_groups_that_its_rows_lie_in(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", rows=20_000, row_group=40, shard_rows=20_000)
    loader = Watched(dataset, "train", 8192, 8, rank=4000, ranks=4096, window=40, ahead=1)
    assert [len(batch) for batch in epoch(loader, loader.start())] == [2, 2, 0]  # its lane has 2,500, 1,024 a batch
    assert len(loader.decoded) <= 3 * 3


def test_4096_lanes_are_read_by_one_rank_and_by_512_without_decoding_a_row_group_for_each(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", rows=20_000, row_group=1000, shard_rows=20_000)
    loaders = [Watched(dataset, "train", 65536, 4096, rank=0, ranks=ranks, window=32, ahead=1) for ranks in (1, 512)]
    whole, part = (list(loader.batches(loader.start())) for loader in loaders)
    assert sorted(whole[0].row_id_B[whole[0].row_id_B >= 0].tolist()) == [
        *range(20_000)
    ]  # lanes of 4 or 5 rows, 16 a batch
    assert [len(loader.decoded) for loader in loaders] == [20, 8]
    assert set(part[0].row_id_B.tolist()) <= set(whole[0].row_id_B.tolist())
    assert int((part[0].row_id_B >= 0).sum()) == sum(loaders[0].lengths[::512])


def test_short_windows_are_shuffled_each_in_itself_but_taken_together(dataset: Dataset, monkeypatch: Any) -> None:
    taken = []
    take = Rows.take
    monkeypatch.setattr(Rows, "take", lambda rows, index: taken.append(len(index)) or take(rows, index))
    loader = Loader(dataset, "train", 8, 1, window=4)  # row groups of 16
    wanted = by_hand(dataset, [1] * 4, lanes=1, share=8, window=4, seed=0, epoch=0)
    assert epoch(loader, loader.start()) == [of_rank(batch, 1, 0, 1) for batch in wanted]
    assert len(taken) < 60  # of 125 windows in 36 row groups, four of which have two rows


def test_a_row_group_is_checked_when_it_is_read_and_the_others_of_its_shard_are_not(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[list[int]] = []
    real = shards_module.check_groups

    def check(dataset: Dataset, shard: Any, footer: Any, columns: Any, groups: Any) -> None:
        checked.append([*groups])
        real(dataset, shard, footer, columns, groups)

    monkeypatch.setattr(shards_module, "check_groups", check)
    monkeypatch.setattr(loader_module, "check_groups", check)
    loader = Loader(dataset, "train", 8)
    loader.decode(1)
    loader.decode(1)
    assert checked == [[], [1], [1]]
