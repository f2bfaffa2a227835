"""Progress by the names of files, in a folder or on a store."""

import threading
import time
import uuid
from types import SimpleNamespace

import pytest

from pipeline.ingest import progress
from pipeline.ingest.progress import Progress, UnitProgress, record_done, record_total, times_of
from pipeline.storage.store_path import place


@pytest.fixture(params=["folder", "store"])
def folder(request, tmp_path):
    if request.param == "folder":
        return tmp_path
    store = place(f"memory://{uuid.uuid4().hex}")
    (store / "reserve").touch()
    return store


def test_a_unit_has_one_file_with_the_bytes_it_was_last_seen_at(folder):
    unit = UnitProgress(folder, 7)
    unit.record(10)  # too early
    assert not list(folder.glob("read-*"))
    unit.every = 0
    for size in (10, 10, 25):
        unit.record(size)
    assert [path.name for path in folder.glob("read-*")] == ["read-000007-000000000000025"]
    assert unit.every == 0 < progress.RECORD_S < progress.STORE_RECORD_S


def lines_of(folder, monkeypatch, body) -> tuple[list[str], int]:
    """What is logged, and how often the folder is listed."""
    lines, listed = [], []
    monkeypatch.setattr(progress.logger, "info", lines.append)
    iterdir = type(folder).iterdir
    monkeypatch.setattr(type(folder), "iterdir", lambda path: listed.append(path) or iterdir(path))
    with Progress(folder, ["read", "label", "write"], 1_000_000) as shown:
        body()
    assert not shown.thread.is_alive()
    monkeypatch.undo()
    return lines, len(listed)


def test_steps_that_end_between_two_listings_have_their_lines_and_times(folder, monkeypatch):
    clock = iter([100.0, 101.0, 103.0, 104.0, 108.0, 116.0, 116.0])
    monkeypatch.setattr(progress, "STORE_LIST_S", 60)  # only the end of the job is seen
    monkeypatch.setattr(progress, "LIST_S", 60)
    monkeypatch.setattr(progress, "time", SimpleNamespace(**{**vars(time), "time": lambda: next(clock)}))

    def body():
        record_done(folder, "read", 0, 100.5, 1_000_000)
        record_total(folder, "label", 1)
        record_done(folder, "label", 0, 103.0)
        record_total(folder, "write", 2)

    lines, listings = lines_of(folder, monkeypatch, body)
    assert lines == [
        "read      1.0/1.0 MB  0.3 MB/s  3.0 s",
        "label     1/1  5.0 s",
        "write     2/2  8.0 s",
    ]
    assert listings <= 2
    assert sorted(times_of(folder)) == [
        ("label", 103.0, 104.0), ("label.total", 103.0, 103.0), ("read", 100.5, 101.0), ("write.total", 108.0, 108.0)
    ]  # fmt: skip


def test_a_piece_that_was_done_twice_counts_once_and_a_step_that_failed_has_no_line(folder, monkeypatch):
    for size in (300_000, 500_000, 500_000):
        record_done(folder, "read", 0, 1.0, size)
    record_done(folder, "read", 1, 1.0, 40_000)
    monkeypatch.setattr(progress, "SECONDS", -1)  # a line for each listing
    monkeypatch.setattr(progress, "STORE_LIST_S", 0.01)
    seen = threading.Event()
    monkeypatch.setattr(progress, "line", lambda step, done, total, _: seen.set() or f"{step} {done}/{total}")
    lines, _ = lines_of(folder, monkeypatch, lambda: seen.wait(20))
    assert set(lines) == {"read 540000/1000000"}
