"""Ranges of files on a store: few requests, the right bytes, and what is missing is an error."""

import errno
import io
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import ranges
from pipeline.storage.ranges import RangedFile, coalesced, read_ranges
from pipeline.storage.store_path import StorePath, place

CONTENT = bytes(n * n % 251 for n in range(40_000))
spans = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=12)


@pytest.fixture
def file() -> StorePath:
    path = place(f"memory://{uuid4().hex}/file")
    path.write_bytes(CONTENT)
    assert isinstance(path, StorePath)
    return path


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, file: StorePath) -> list[tuple[int, int]]:
    """Ranges that are asked for, while only 1000 bytes are at once."""
    asked: list[tuple[int, int]] = []
    cat_file = type(file.system).cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **named: Any) -> bytes:
        asked.append((start or 0, end or len(CONTENT)))
        return cat_file(self, path, start, end, **named)

    monkeypatch.setattr(type(file.system), "cat_file", counted)
    monkeypatch.setattr(ranges, "REQUEST_BYTES", 1000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 100)
    return asked


@given(spans, st.integers(0, 20))
def test_coalesced_ranges_cover_the_bytes_asked_for_and_gaps_that_are_small(
    found: list[tuple[int, int]], gap: int
) -> None:
    wanted = {byte for start, stop in found for byte in range(start, stop)}
    made = coalesced(found, gap)
    covered = {byte for start, stop in made for byte in range(start, stop)}
    assert wanted <= covered
    assert all(start in wanted and stop - 1 in wanted for start, stop in made)  # no more than needed at both ends
    assert all(after[0] - before[1] > gap for before, after in zip(made, made[1:], strict=False))
    for byte in covered - wanted:  # lies in a gap no longer than allowed
        before, after = max(w for w in wanted if w < byte), min(w for w in wanted if w > byte)
        assert after - before - 1 <= gap


def test_ranges_are_read_in_their_order_and_large_ones_in_parts(
    file: StorePath, requests: list[Any], tmp_path: Path
) -> None:
    wanted = [(30_000, 32_500), (5, 10), (7, 7), (0, 1000)]
    assert read_ranges(file, wanted) == [CONTENT[start:stop] for start, stop in wanted]
    assert requests == [(30_000, 31_000), (31_000, 32_000), (32_000, 32_500), (5, 10), (0, 1000)]
    (tmp_path / "mounted").write_bytes(CONTENT)
    assert read_ranges(tmp_path / "mounted", wanted) == read_ranges(file, wanted)


@pytest.mark.parametrize("on_store", [True, False])
def test_a_file_that_ends_before_a_range_is_an_error_at_once(on_store: bool, file: StorePath, tmp_path: Path) -> None:
    (tmp_path / "mounted").write_bytes(CONTENT)
    path = file if on_store else tmp_path / "mounted"
    with pytest.raises(OSError, match="ends before byte 40,001") as error:
        read_ranges(path, [(0, 3), (39_000, 40_001)])
    assert error.value.errno is None  # damaged, not gone
    path.unlink()
    with pytest.raises(FileNotFoundError) as gone:
        read_ranges(path, [(0, 3)])
    assert gone.value.errno


def test_a_request_that_fails_is_repeated_and_no_other_one(
    file: StorePath, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cat_file, failures = type(file.system).cat_file, [ConnectionResetError("gone"), OSError(errno.EIO, "503")]

    def failing(self: Any, path: str, start: int, end: int, **named: Any) -> bytes:
        found = cat_file(self, path, start, end, **named)
        if start == 1000 and failures:
            raise failures.pop()
        return found

    monkeypatch.setattr(type(file.system), "cat_file", failing)
    assert read_ranges(file, [(0, 3000)]) == [CONTENT[:3000]]
    assert sorted(requests) == [(0, 1000), *[(1000, 2000)] * 3, (2000, 3000)]


@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 3000)), max_size=3),
    st.lists(st.tuples(st.integers(0, 41_000), st.sampled_from([0, 1, 2]), st.integers(0, 3000)), max_size=8),
)
def test_a_ranged_file_reads_as_a_file_in_memory(
    fetched: list[tuple[int, int]], reads: list[tuple[int, int, int]]
) -> None:
    path = place(f"memory://{uuid4().hex}/file")
    path.write_bytes(CONTENT)
    file, twin = RangedFile(path), io.BytesIO(CONTENT)
    file.fetch([(start, min(start + size, len(CONTENT))) for start, size in fetched], gap=10)
    for place_, whence, size in reads:
        offset = place_ - (0, twin.tell(), len(CONTENT))[whence]
        assert file.seek(offset, whence) == twin.seek(offset, whence) == place_
        assert file.read(size) == twin.read(size)
        assert file.tell() == twin.tell()
    path.unlink()


def test_a_ranged_file_asks_for_nothing_that_it_has_and_for_little_at_a_time(
    file: StorePath, requests: list[Any]
) -> None:
    ranged = RangedFile(file, len(CONTENT))
    ranged.fetch([(39_900, 40_000), (100, 400), (500, 700)], gap=100)
    assert requests == [(100, 700), (39_900, 40_000)]
    ranged.seek(-50, os.SEEK_END)
    assert ranged.read() == CONTENT[-50:]
    ranged.seek(150)
    assert ranged.read(500) == CONTENT[150:650]
    assert len(requests) == 2
    assert ranged.read(60) == CONTENT[650:710]  # ten bytes of which were not fetched: a block of a hundred
    assert [ranged.read(5) for _ in range(10)] == [CONTENT[n : n + 5] for n in range(710, 760, 5)]
    assert requests[2:] == [(700, 800)]
    ranged.forget()
    ranged.seek(150)
    assert ranged.read(2) == CONTENT[150:152]
    assert requests[3:] == [(150, 250)]
