"""pipeline/storage: what every registered storage guarantees. A member that is not local adds its root to `ROOTS`."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.storage.base import Storage
from pipeline.storage.files import STORAGES, read_lines, storage_of, write_json
from pipeline.storage.local import LocalStorage, fsync_all, remove_leftovers, replacing

ROOTS = {"": "tmp_path", "memory": "memory", "s3": "s3"}  # fixtures; a scheme of fsspec's is one more name for a member

pytestmark = pytest.mark.integration


@pytest.fixture(params=ROOTS)
def place(request: pytest.FixtureRequest) -> tuple[Storage, Path]:
    """A storage and an empty folder in it."""
    root = request.getfixturevalue(ROOTS[request.param])
    return storage_of(root), root


def test_every_storage_has_a_root_here() -> None:
    assert {type(storage) for storage in STORAGES.values()} == {type(STORAGES[scheme]) for scheme in ROOTS}


def test_content_comes_back_and_is_replaced_whole(place: tuple[Storage, Path]) -> None:
    storage, root = place
    for content in (b"", b"\x00\xff" * 1000, b"short"):
        storage.write(root / "file", content)
        assert storage.read(root / "file") == content
    assert storage.list(root, "*") == [root / "file"], "no temporary file stays"


def test_a_reader_sees_the_old_content_or_the_new(place: tuple[Storage, Path]) -> None:
    storage, root = place
    versions = [bytes([number]) * 200_000 for number in range(20)]
    storage.write(root / "file", versions[0])

    def write_all() -> None:
        for version in versions:
            storage.write(root / "file", version)

    writer = threading.Thread(target=write_all)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(storage.read(root / "file"))
    writer.join()
    assert seen <= set(versions)
    assert storage.read(root / "file") == versions[-1]


def test_list_sorts_what_matches_and_is_empty_without_a_folder(place: tuple[Storage, Path]) -> None:
    storage, root = place
    for name in ("step-2", "step-10", "other", "step-1"):
        storage.write(root / name, b"")
    assert [path.name for path in storage.list(root, "step-*")] == ["step-1", "step-10", "step-2"]
    assert storage.list(root / "missing", "*") == []


def test_a_committed_folder_is_there_whole_with_nothing_of_the_one_before(place: tuple[Storage, Path]) -> None:
    storage, root = place
    for number in (1, 2):
        (root / "staging").mkdir(exist_ok=True)
        names = {"a", "sub/b", "manifest.json", f"only-{number}"}
        for name in names:
            (root / "staging" / name).parent.mkdir(exist_ok=True)
            storage.write(root / "staging" / name, bytes([number]))
        storage.commit(root / "staging", root / "final")
        files = [file for file in (root / "final").rglob("*") if file.is_file()]
        assert {file.relative_to(root / "final").as_posix(): storage.read(file) for file in files} == dict.fromkeys(
            names, bytes([number])
        )
    if (root / "staging").exists():
        assert storage.read(root / "staging" / "a") == bytes([1]), "the earlier folder, for its owner to delete"


def test_one_exclusive_lock_or_many_shared_ones(place: tuple[Storage, Path]) -> None:
    storage, root = place
    storage.write(root / "file", b"")
    with (
        storage.lock(root / "file", shared=True),
        storage.lock(root / "file", shared=True),
        pytest.raises(BlockingIOError),
    ):
        storage.lock(root / "file")
    with storage.lock(root / "file"), pytest.raises(BlockingIOError):
        storage.lock(root / "file", shared=True)
    storage.lock(root / "file").release()
    with pytest.raises(FileNotFoundError):
        storage.lock(root / "missing")


LOCKS_AND_WAITS = """
import sys
from pipeline.storage.files import storage_of
from pipeline.storage.store_path import place
path = place(sys.argv[1])
lock = storage_of(path).lock(path)
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(place: tuple[Storage, Path]) -> None:
    storage, root = place
    if str(root).startswith("memory:"):
        pytest.skip("of one process alone")
    storage.write(root / "file", b"")
    command = [sys.executable, "-c", LOCKS_AND_WAITS, str(root / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError):
            storage.lock(root / "file")
        process.kill()
        process.wait()
        storage.lock(root / "file").release()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert (tmp_path / "file.json").read_text() == '{\n "a": 1\n}'
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_lines_are_read_up_to_the_last_complete_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_lines(tmp_path / "a.jsonl")] == [1, 2]
    assert list(read_lines(tmp_path / "missing.jsonl")) == []


def test_a_lock_creates_an_empty_file_or_leaves_the_one_that_is_there(place: tuple[Storage, Path]) -> None:
    storage, root = place
    storage.write(root / "kept", b"content")
    for name, content in (("made", b""), ("kept", b"content")):
        with storage.lock(root / name, create=True):
            assert storage.read(root / name) == content


def test_neither_a_write_nor_a_lock_reaches_what_a_link_points_to(tmp_path: Path) -> None:
    storage, target = LocalStorage(), tmp_path / "target"
    target.write_bytes(b"of somebody else")
    for name in ("file", "lock", "dangling"):
        (tmp_path / name).symlink_to(target if name != "dangling" else tmp_path / "made")
    storage.write(tmp_path / "file", b"ours")
    for name in ("lock", "dangling"):
        with pytest.raises(OSError, match="symbolic link") as refused:
            storage.lock(tmp_path / name, create=True)
        assert refused.value.errno == errno.ELOOP
    assert target.read_bytes() == b"of somebody else"
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "file").read_bytes() == b"ours"
    assert not (tmp_path / "file").is_symlink()


def test_two_writes_of_one_process_use_names_that_cannot_be_guessed(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as other:
        for path in (one, other):
            assert path.parent == tmp_path
            assert len(path.name) >= len(".file.") + 32
            path.write_bytes(b"")
        assert one != other


def test_what_a_killed_writer_left_is_removed_once_it_is_old_enough(tmp_path: Path) -> None:
    file, other = tmp_path / "part[1].parquet", tmp_path / "part1.parquet"
    with replacing(file) as temporary:
        left = temporary
    others = [file, tmp_path / f".{other.name}.{'0' * 32}", tmp_path / f".{file.name}.notes"]
    for each in (left, *others):
        each.touch()
    os.utime(left, (time.time() - 100, time.time() - 100))
    remove_leftovers(file, seconds=200)
    assert left.exists()
    remove_leftovers(file, seconds=50)
    assert (left.exists(), [each.exists() for each in others]) == (False, [True] * 3)


def test_every_file_and_folder_below_one_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"")
    waited: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: waited.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    fsync_all(tmp_path)
    assert sorted(waited) == sorted(str(tmp_path / name) for name in ("", "a", "a/b", "a/b/file"))
