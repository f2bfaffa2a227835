"""The cache on a local disk: what is in it is right or not there, and it keeps to its size."""

import errno
import logging
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import UserError
from pipeline.storage.cache import DIGEST_BYTES, SUFFIX, UNNAMED, DiskCache


def held(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_entries_are_found_by_other_processes_of_the_same_folder(tmp_path: Path) -> None:
    DiskCache(tmp_path / "a" / "b", 1 << 20).put("x-0-3", b"abc")
    other = DiskCache(tmp_path / "a" / "b", 1 << 20)
    assert other.get("x-0-3") == b"abc"
    assert other.get("x-0-4") is None


@given(st.data())
def test_an_entry_with_any_damage_is_none_and_can_be_written_again(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        damage(Path(name), data)


def damage(folder: Path, data: st.DataObject) -> None:
    cache, content = DiskCache(folder, 1 << 20), b"some content"
    cache.put("x", content)
    file = folder / f"x{SUFFIX}"
    whole = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "swap"]))
    if kind == "swap":  # a whole entry under another's name
        file.rename(folder / f"y{SUFFIX}")
        assert cache.get("y") is None
    else:
        place = data.draw(st.integers(0, len(whole) - 1))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
        file.write_bytes({"flip": flipped, "cut": whole[:place], "longer": whole + b"0"}[kind])
    assert cache.get("x") is None
    cache.put("x", content)
    assert cache.get("x") == content


@pytest.mark.parametrize("writers", [1, 4])
def test_it_keeps_to_its_limit_and_to_what_was_read_last(tmp_path: Path, writers: int) -> None:
    limit, size = 100_000, 1000 - DIGEST_BYTES
    caches = [DiskCache(tmp_path / "c", limit, writers) for _ in range(writers)]
    for number in range(400):
        caches[number % writers].put(f"{number}", bytes(size))
        os.utime(
            tmp_path / "c" / f"{number}{SUFFIX}", ns=(number, number)
        )  # times apart, whatever the file system's are
        if number % 10 == 0:
            assert caches[0].get("0") is not None
        assert held(tmp_path / "c") <= limit
    assert held(tmp_path / "c") >= limit // 2
    kept = {int(file.stem) for file in (tmp_path / "c").iterdir()}
    assert kept - {0} >= set(range(400 - 50, 400))


def test_what_earlier_processes_left_beyond_the_limit_is_deleted_and_no_entry_takes_all_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        DiskCache(tmp_path, 1 << 20).put(f"{number}", bytes(1000))
    killed = tmp_path / f"killed{UNNAMED}"
    killed.write_bytes(bytes(1000))
    os.utime(killed, (1, 1))
    small = DiskCache(tmp_path, 10_000)
    small.put("new", b"1")
    assert held(tmp_path) <= 10_000
    assert not killed.exists()
    small.put("large", bytes(9000))
    assert small.get("large") is None
    assert "Allow 36,128" in caplog.text
    assert small.get("new") == b"1"


def test_files_of_others_in_the_folder_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(50_000))
    os.utime(tmp_path / "weights.bin", (1, 1))
    cache = DiskCache(tmp_path, 10_000)
    for number in range(20):
        cache.put(f"{number}", bytes(1000))
    assert (tmp_path / "weights.bin").exists()
    assert cache.get("19") is not None
    assert held(tmp_path) <= 60_000


def test_a_full_disk_ends_caching_with_one_warning_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path, 1 << 20)
    cache.put("before", b"1")
    opened, asked = Path.open, []

    def full(self: Path, *arguments: Any, **named: Any) -> Any:
        file = opened(self, *arguments, **named)
        if self.suffix == UNNAMED:
            asked.append(self)
            file.write(b"part")

            def fail(_: bytes) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            class Full:
                write = staticmethod(fail)

                def __enter__(self) -> "Full":
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

            return Full()
        return file

    monkeypatch.setattr(Path, "open", full)
    with caplog.at_level(logging.WARNING):
        cache.put("x", b"2")
        cache.put("y", b"3")
    assert len(asked) == 1
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    assert [file.name for file in tmp_path.iterdir()] == [f"before{SUFFIX}"]
    assert cache.get("before") == b"1"


def test_writers_and_readers_side_by_side_see_whole_entries_only(tmp_path: Path) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        cache = DiskCache(tmp_path, 60_000, 4)
        for step in range(150):
            name = f"{(step * 7 + number) % 40}"
            found = cache.get(name)
            if found is None:
                cache.put(name, name.encode() * 500)
            elif found != name.encode() * 500:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert held(tmp_path) <= 60_000


def test_a_folder_that_cannot_be_written_is_said_at_the_start_and_a_link_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.cache=.*file: cannot be written"):
        DiskCache(tmp_path / "file", 1)
    cache = DiskCache(tmp_path / "c", 1 << 20)
    cache.put("x", b"1")
    entry = tmp_path / "c" / f"x{SUFFIX}"
    entry.rename(tmp_path / "x")
    entry.symlink_to(tmp_path / "x")
    assert cache.get("x") is None
