"""Decoding processes: the same batches as without them, and their ends."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loader import SCHEMA, make_dataset, same

from features.batch import Rows
from features.errors import UserError
from pipeline import cores
from pipeline.dataset import decoding
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader

SETTINGS: dict[str, Any] = {"seed": 3, "rank": 1, "ranks": 3, "window": 24, "max_corrupt": 0.5}


class Reading:
    """A loader with two processes and one without, of parts of three lanes that one rank of three has; and their starter."""

    def __init__(self, dataset: Dataset) -> None:
        self.alone = Loader(dataset, "train", 16, 8, **SETTINGS)
        self.ended, self.started = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.start, args=[dataset])
        self.thread.start()
        self.started.wait()

    def start(self, dataset: Dataset) -> None:
        self.loader = Loader(dataset, "train", 16, 8, **SETTINGS, workers=2)
        self.started.set()
        self.ended.wait()


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reading]:
    dataset = make_dataset(tmp_path_factory.mktemp("processes") / "data", rows=500, row_group=16, shard_rows=130)
    file = dataset.path / dataset.shards("train")[2].path
    bad = bytearray(file.read_bytes())
    bad[60] ^= 8
    file.write_bytes(bad)
    made = Reading(dataset)
    yield made
    made.ended.set()


@pytest.mark.system
def test_processes_make_the_same_batches_bit_for_bit_and_leave_the_same_rows_out(
    reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    loader, alone = reading.loader, reading.alone
    for epoch in range(2):
        for done in (0, 3):
            start = alone.after(alone.start(epoch), done)
            with caplog.at_level(logging.WARNING):
                batches, wanted = list(loader.batches(start)), list(alone.batches(start))
            assert len(batches) == len(wanted) > loader.decoders.slots
            assert all(map(same, batches, wanted))
    assert loader.corrupt == alone.corrupt
    assert [r.getMessage().count("row group 0: cannot be read") for r in caplog.records] == [
        1,
        1,
    ]  # once by each loader


@pytest.mark.system
def test_too_many_corrupt_rows_of_all_processes_are_one_error_at_the_same_batch(reading: Reading) -> None:
    ends = []
    for loader in (reading.loader, reading.alone):
        loader.corrupt.clear()
        loader.max_corrupt, count = 0.01, 0
        with pytest.raises(UserError, match="16 of 500 rows cannot be read") as error:
            for count, _ in enumerate(loader.batches(loader.start()), start=1):  # noqa: B007
                pass
        loader.max_corrupt = 0.5
        ends.append((count, str(error.value)))
    assert ends[0] == ends[1]


@pytest.mark.system
def test_a_new_iterator_begins_anew_and_ends_the_one_before(reading: Reading) -> None:
    loader, start = reading.loader, reading.loader.start()
    before = loader.batches(start)
    assert same(next(before), next(reading.alone.batches(start)))
    assert all(map(same, loader.batches(start), reading.alone.batches(start)))
    with pytest.raises(RuntimeError, match="one iterator at a time"):
        list(before)


@pytest.mark.system
def test_processes_end_with_their_starter_and_the_rank_says_so_in_one_line(reading: Reading) -> None:
    batches = reading.loader.batches(reading.loader.start())
    next(batches)
    assert reading.loader.steps(reading.loader.start()) > reading.loader.ahead + reading.loader.decoders.slots + 2
    pids = [worker.process.pid for worker in reading.loader.decoders.workers]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    reading.ended.set()  # for the kernel the same as the end of the whole process: the parent of these is a thread
    reading.thread.join()
    with pytest.raises(UserError, match=r"process . of 2 ended \(SIGKILL\)\. .*train\.decode_workers") as error:
        list(batches)
    assert "\n" not in str(error.value)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/maps").exists() and Path(f"/proc/{pid}/maps").read_text() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


# Without processes


def rows_of(count: int, length: int, filled: int) -> Rows:
    rows = Rows.blank(SCHEMA, count)
    rows.value_V = torch.zeros(length, dtype=rows.value_V.dtype)
    return Rows(*decoding.of_fields(rows, lambda tensor: torch.full_like(tensor, filled)))


def test_rows_of_any_size_come_through_the_memory_as_they_were() -> None:
    file = os.memfd_create("test")
    os.truncate(file, 2 * decoding.SLOT)
    mine, other = decoding.Memory(file), decoding.Memory(file)
    for size, slot in [(1, 0), (300, 0), (2, 1), (50_000, 0), (0, 1), (7, 0)]:
        sent = rows_of(size, 3 * size, size)
        found = other.read(slot, mine.write(slot, sent))
        for wanted, tensor in zip(*(decoding.of_fields(rows, lambda t: t) for rows in (sent, found)), strict=True):
            assert wanted.dtype == tensor.dtype
            assert torch.equal(wanted.nan_to_num(), tensor.nan_to_num())
    held = os.fstat(file).st_blocks * 512
    assert held < 10_000_000  # of twice 64 GB: what was written alone
    os.close(file)


@pytest.mark.parametrize("processes", [1, 3])
def test_rows_are_kept_when_their_slot_is_written_again_and_no_more_are_asked_for_than_there_are_slots(
    processes: int,
) -> None:
    asked: list[int] = []

    class Worker:
        def __init__(self) -> None:
            self.slots = [rows_of(2, 4, 0) for _ in range(3)]
            self.made = self.used = 0

        def begin(self, position: object) -> None: ...

        def ask(self, slot: int) -> None:
            self.made += 1
            asked.append(self.made - self.used)
            for f in ("row_id_N", "weight_N"):
                getattr(self.slots[slot], f).fill_(self.made)

        def part(self, slot: int, on_corrupt: object) -> Rows:
            self.used += 1
            return self.slots[slot]

    decoders = object.__new__(decoding.Decoders)
    vars(decoders).update(slots=3, turn=0, lock=threading.Lock(), workers=[Worker() for _ in range(processes)])
    made = list(decoders.rows(None, 7, lambda *_: None))
    assert [rows.row_id_N.tolist() for rows in made] == [[step] * 2 * processes for step in range(1, 8)]
    assert max(asked) == 3


def test_a_user_error_of_a_process_is_raised_as_it_is_and_a_defect_with_its_traceback() -> None:
    def failing(error: Exception) -> Iterator[Rows]:
        yield from ()
        raise error

    wrong = UserError("what, where, what to do")
    assert decoding.made(failing(wrong), decoding.Memory(-1), 0) is wrong
    defect = decoding.made(failing(ZeroDivisionError("there")), decoding.Memory(-1), 0)
    assert isinstance(defect, RuntimeError)
    assert "ZeroDivisionError: there" in str(defect)
    worker = SimpleNamespace(_receive=lambda: decoding.Reply(wrong, [(3, "why")]))
    found: list[object] = []
    with pytest.raises(UserError, match="what, where, what to do"):
        decoding.Worker.part(worker, 0, lambda *corrupt: found.append(corrupt))
    assert found == [(3, "why")]


@pytest.mark.parametrize(
    ("setting", "device", "of_node", "ranks", "processes"),
    [
        (None, "cpu", 64, 8, 0), (None, "cuda", 64, 8, 7), (None, "cuda", 192, 8, 8), (None, "cuda", 8, 8, 0),
        (3, "cpu", 1, 1, 3), (0, "cuda", 64, 8, 0),
    ],
)  # fmt: skip
def test_processes_follow_from_device_and_cores_unless_they_are_set(
    setting: int | None, device: str, of_node: int, ranks: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "available", lambda: of_node)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert decoding.processes_of(setting, torch.device(device)) == processes


def test_a_rank_has_no_more_processes_than_lanes_and_all_lanes_in_order() -> None:
    assert decoding.split(range(3), 8) == [range(1), range(1, 2), range(2, 3)]
    for lanes in range(1, 20):
        for processes in range(1, 9):
            parts = decoding.split([*range(lanes)], processes)
            assert [*chain(*parts)] == [*range(lanes)]
            assert {len(part) for part in parts} <= {lanes // len(parts), -(-lanes // len(parts))}
