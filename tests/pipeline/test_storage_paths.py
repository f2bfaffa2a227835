"""Paths on a store against pathlib on a local folder: the same operations in the same order, and what pathlib cannot have."""

import errno
import gc
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixtures import FaultProxy

from pipeline.storage.store_path import StorePath, on_store, place, remove_all, remove_tree

pytestmark = pytest.mark.integration
NAMES = ["a", "b.json", ".hidden", "d/x", "d/e/y.json", "d/e", "st[1]", "d/st[1]*/z"]
PATTERNS = [
    "*",
    "*.json",
    "*/*",
    "**/*.json",
    "**/*",
    "d/*",
    "*/x",
    "d/e/y.json",
    "nothing",
    "a",
    "[ab]*",
    ".*",
    "**/e/*",
]


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> StorePath:
    found: StorePath = request.getfixturevalue(request.param)
    return found


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the class of its OSError; where a file is taken for a folder, nothing is there."""
    try:
        return call()
    except OSError as error:
        return FileNotFoundError if isinstance(error, NotADirectoryError) else type(error)


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Both:
    """One operation on a local folder and on a store's; the local one makes the folders that a store does not need."""

    def __init__(self, local: Path, store: StorePath) -> None:
        self.local, self.store = local, store

    def write(self, name: str, content: bytes) -> None:
        if (self.local / name).is_dir() or self.below_a_file(name):
            return  # which a store has no objection to
        (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        assert [path.joinpath(name).write_bytes(content) for path in (self.local, self.store)] == [len(content)] * 2

    def below_a_file(self, name: str) -> bool:
        return any(self.local.joinpath(up).is_file() for up in PurePosixPath(name).parents)

    def unlink(self, name: str, missing_ok: bool) -> None:
        if (self.local / name).is_dir() or self.below_a_file(name):
            return
        self.same(lambda root: (root / name).unlink(missing_ok=missing_ok))
        self.prune()

    def prune(self) -> None:
        for folder in sorted(self.local.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # as it is on a store

    def rename(self, name: str, other: str) -> None:
        local = self.local / other
        if not (self.local / name).is_file() or local.is_dir() or self.below_a_file(other) or name == other:
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        for root in (self.local, self.store):
            assert (root / name).rename(root / other) == root / other
        self.prune()

    def same(self, call: Callable[[Path], Any]) -> None:
        """Both answer alike."""
        found = [outcome(lambda root=root: call(root)) for root in (self.local, self.store)]  # type: ignore[misc]
        assert found[0] == found[1]

    def check(self) -> None:
        assert files(self.local) == files(self.store)
        for name in ("", *NAMES):
            if not name and not any(self.local.iterdir()):
                continue  # an empty folder is none
            for question in ("exists", "is_file", "is_dir", "is_symlink", "read_bytes"):
                if question == "read_bytes" and (self.local / name).is_dir():
                    continue
                self.same(lambda root, q=question, n=name: getattr(root / n, q)())  # type: ignore[misc]
            self.same(lambda root, n=name: sorted(p.name for p in (root / n).iterdir()))  # type: ignore[misc]
            self.same(lambda root, n=name: (root / n).stat().st_size if (root / n).is_file() else 0)  # type: ignore[misc]
        for pattern in PATTERNS:
            found = [sorted(p.relative_to(root) for p in root.glob(pattern)) for root in (self.local, self.store)]
            assert found[0] == found[1], pattern


OPERATION = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.binary(max_size=3)),
    st.tuples(st.just("unlink"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATION, max_size=12))
def test_a_sequence_of_operations_leaves_what_pathlib_leaves(
    operations: list[Any], tmp_path_factory: pytest.TempPathFactory, memory: StorePath
) -> None:
    both = Both(tmp_path_factory.mktemp("local"), memory / os.urandom(8).hex())
    for name, *arguments in operations:
        getattr(both, name)(*arguments)
    both.check()


def test_s3_answers_as_pathlib_does(tmp_path: Path, s3: StorePath) -> None:
    both = Both(tmp_path, s3)
    for name in NAMES:
        both.write(name, name.encode())
    both.check()
    for name in NAMES[:4]:
        both.unlink(name, False)
        both.unlink(name, True)
    both.rename("st[1]", "d/x")
    both.check()


PURE: list[Callable[[Path], Any]] = [
    lambda p: p.name, lambda p: p.stem, lambda p: p.suffix, lambda p: p.suffixes, lambda p: p.parent.name,
    lambda p: p.with_name("n").name, lambda p: p.with_suffix(".t").name, lambda p: [q.name for q in p.parents][:2],
    lambda p: (p / "x" / "y").relative_to(p), lambda p: p.is_relative_to(p.parent),
    lambda p: (p.match("*.c"), p.match("folder/a*"), p.match("x/*")),
    lambda p: (p.parent / "z" > p, p == p.parent / p.name, hash(p) == hash(p.parent / p.name)), lambda p: p.parts[-2:],
    lambda p: sorted([p / "b", p / "a", p])[-1].name, lambda p: (p / PurePosixPath("q/r")).relative_to(p),
    lambda p: p.joinpath("m", "n").parts[-2:], lambda p: (p / "." / "x").name,
]  # fmt: skip


@pytest.mark.parametrize("call", PURE, ids=range(len(PURE)))
def test_what_needs_no_store_is_as_of_a_path(call: Callable[[Path], Any]) -> None:
    assert call(StorePath("s3://bucket/folder/a.b.c")) == call(Path("/bucket/folder/a.b.c"))


def test_a_path_on_a_store_is_told_from_one_that_is_mounted() -> None:
    path = place("s3://bucket/a//b/")
    assert (str(path), f"{path}", path.as_posix(), repr(path)) == (
        *["s3://bucket/a/b"] * 3,
        "StorePath('s3://bucket/a/b')",
    )
    assert path == StorePath("s3://bucket/a/b") != Path("s3:/bucket/a/b")
    assert [str(up) for up in path.parents] == ["s3://bucket/a", "s3://bucket"]
    assert str(path.parent.parent.parent) == "s3://bucket"
    assert (on_store(path), on_store(Path("s3:/bucket/a"))) == (True, False)
    assert type(pickle.loads(pickle.dumps(path))) is StorePath
    assert pickle.loads(pickle.dumps(path)) == path
    assert path.resolve() == path.absolute() == path.expanduser() == path
    assert (path.is_absolute(), place(path), str(path.with_name("c"))) == (True, path, "s3://bucket/a/c")
    assert Path("/somewhere") / path == "folder" / path == Path("a").joinpath("b") / path == path
    for call in (os.fspath, os.stat, open, os.listdir, Path.chmod, Path.readlink):
        with pytest.raises(TypeError):
            call(path) if call is not Path.chmod else path.chmod(0o600)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("s3://key:secret@bucket/a", "password"),
        ("s3://key:ab/secret@bucket/a", "password"),
        ("s3://key:secret", "password"),
        ("s3://bucket/secret@bucket/a", "password"),
        ("hdfs://user:secret@host:8020/a", "password"),
        ("abfs://c@secret/d?sv=1&sig=secret", "signature"),
        ("s3://bucket/x?X-Amz-Signature=secret", "signature"),
        ("s3://bucket/x?x=1&X-Amz-Security-Token=secret", "signature"),
        ("nowhere://bucket/a", "is no storage"),
        ("reference::s3://bucket/a", "is no storage"),
        ("s3://", "names no bucket"),
        ("s3:///a", "names no bucket"),
        ("hdfs:///a", "names no host"),
        ("s3://bucket/a/../../other", r"\.\."),
        ("s3://bucket/a\nb", "control character"),
    ],
)
def test_a_url_that_is_no_place_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as refused:
        place(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["hdfs://host:8020/a", "webhdfs://user@host:9870/a", "abfs://c@a.dfs.core.windows.net/d", "s3://bucket/a:b?c=1"],
)
def test_a_url_with_a_port_or_a_container_is_taken(text: str) -> None:
    assert str(place(text)) == text


def test_each_host_of_a_url_is_a_store_of_its_own() -> None:
    one, other = (StorePath(f"webhdfs://{host}:9870/folder/file") for host in ("one", "other"))
    assert (one.system.url, other.system.url) == ("http://one:9870/webhdfs/v1", "http://other:9870/webhdfs/v1")
    assert (one / "below").system is one.system
    with pytest.raises(OSError, match="another store") as refused:
        one.rename(other)
    assert refused.value.errno == errno.EXDEV


def test_a_file_url_is_a_path() -> None:
    assert [place(f"file://{text}") for text in ("/a/b", "localhost/a/b")] == [Path("/a/b")] * 2


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/../../b"])
def test_a_name_does_not_lead_out_of_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="does not lie below"):
        StorePath("s3://bucket/a") / name


def test_a_name_is_no_pattern(root: StorePath) -> None:
    for name in ("run*", "run1", "st[1]", "st1/a", "st[1]x/b", "run2/b"):
        (root / name).write_bytes(b"x")
    remove_tree(root / "run*")
    remove_tree(root / "st[1]")
    assert sorted(files(root)) == ["run1", "run2/b", "st1/a", "st[1]x/b"]


def test_a_folder_is_gone_with_its_last_file(s3: StorePath) -> None:
    (s3 / "a/b/c").write_bytes(b"x")
    assert [(s3 / name).is_dir() for name in ("", "a", "a/b", "a/b/c")] == [True, True, True, False]
    (s3 / "a/b/c").unlink()
    assert [(s3 / name).exists() for name in ("", "a", "a/b", "a/b/c")] == [False] * 4


def test_files_are_opened_read_and_written_as_files_are(root: StorePath) -> None:
    content = bytes(range(256)) * 100
    with (root / "a").open("wb") as file:
        file.write(content[:1000])
        file.write(memoryview(content)[1000:])
    with (root / "a").open("rb") as one, (root / "a").open("rb") as other:  # each with a position of its own
        assert (one.seek(-3, os.SEEK_END), one.read(), one.read()) == (len(content) - 3, content[-3:], b"")
        assert other.read(10) + other.read() == content
    with (root / "t").open("w", encoding="utf-8") as text:
        text.write("é\r\nb\n")
    assert (root / "t").read_text() == "é\nb\n"
    with (root / "t").open() as text:
        assert text.readlines() == ["é\n", "b\n"]
    with pytest.raises(FileExistsError):
        (root / "t").open("x")
    with pytest.raises(FileNotFoundError):
        (root / "missing").open()
    with pytest.raises(OSError, match="in place"):
        (root / "t").open("a")


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_whose_block_raises_is_not_written(root: StorePath, mode: str) -> None:
    def write() -> None:
        with (root / "a").open(mode) as file:
            file.write("text" if mode == "w" else b"bytes")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    gc.collect()
    assert not (root / "a").exists()


def test_touch_mkdir_and_rmdir_lose_nothing(root: StorePath) -> None:
    (root / "d" / "a").write_bytes(b"kept")
    (root / "d" / "a").touch()
    (root / "d" / "new").touch()
    assert [(root / "d" / name).read_bytes() for name in ("a", "new")] == [b"kept", b""]
    (root / "d").mkdir(exist_ok=True)
    for refused in ((root / "d").mkdir, (root / "d" / "a").mkdir):
        with pytest.raises(FileExistsError):
            refused()
    with pytest.raises(OSError, match="not empty"):
        (root / "d").rmdir()
    (root / "d" / "a").rename(root / "d" / "a")
    assert (root / "d" / "a").read_bytes() == b"kept"
    with pytest.raises(FileNotFoundError):
        (root / "missing").rename(root / "other")


def test_threads_and_a_forked_process_use_one_store(s3: StorePath) -> None:
    def work(number: int) -> None:
        (s3 / str(number)).write_bytes(bytes([number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process = os.fork()
    if not process:
        try:
            (s3 / "child").write_bytes((s3 / "3").read_bytes())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    assert files(s3) == {**{str(number): bytes([number]) for number in range(8)}, "child": bytes([3])}


def test_many_files_are_deleted_by_one_request_and_their_names_are_no_patterns(
    through_proxy: StorePath, proxy: FaultProxy, memory: StorePath
) -> None:
    names = ["a*", "ab", "c[d]", "cd", *map(str, range(12))]
    for root in (through_proxy, memory):
        for name in names:
            (root / name).write_bytes(b"x")
        proxy.requests.clear()
        remove_all([root / name for name in names if name not in ("ab", "cd")] + [root / "missing"])
        assert len(proxy.requests) == (1 if root is through_proxy else 0)
        assert [*files(root)] == ["ab", "cd"]
        remove_all([])
