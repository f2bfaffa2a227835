"""Leases, commits and staging folders on a store: dead owners, lost leases, two writers, kills at any moment."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import get_loop
from store_fixtures import FaultProxy

from features.errors import UserError
from pipeline.storage import lease, object_files, objects, patience, store_path
from pipeline.storage.files import storage_of
from pipeline.storage.lease import folder_of
from pipeline.storage.staging import recover, staging_of
from pipeline.storage.store_path import StorePath, remove_tree

pytestmark = pytest.mark.system
SHORT_S = 1.0


@pytest.fixture(autouse=True)
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", SHORT_S)


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> StorePath:
    found: StorePath = request.getfixturevalue(request.param)
    return found


def foreign(file: StorePath, **changes: Any) -> None:
    """Rewrites a lease as one of another machine's process."""
    about = json.loads(file.read_bytes())
    file.write_bytes(json.dumps({**about, "host": "elsewhere", "boot": "other", **changes}).encode())


def test_a_lease_leaves_nothing_and_is_free_again(root: StorePath) -> None:
    for shared in (False, True):
        with lease.lease(root / "file", shared) as lock:
            assert not lock.lost
            assert len(list(folder_of(root / "file").iterdir())) == 1
        assert list(root.rglob("*")) == []
    del lock


def test_what_the_garbage_collector_finds_is_released_also_in_the_thread_that_asks_the_store(
    s3: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "PART_BYTES", 5 << 20)
    writer = (s3 / "upload").open("wb")
    writer.write(bytes(6 << 20))
    found = [lease.lease(s3 / "file"), writer]
    del writer
    bucket = s3.key.partition("/")[0]

    def left() -> bool:
        uploads = s3.system.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
        return s3.exists() or any(each["Key"].startswith(s3.name) for each in uploads)

    assert left()
    get_loop().call_soon_threadsafe(found.clear)
    deadline = time.monotonic() + 5
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left()


def test_a_lease_is_renewed_while_it_is_held(s3: StorePath) -> None:
    root = s3
    with lease.lease(root / "file") as lock:
        foreign_process = json.loads((folder_of(root / "file") / "exclusive").read_bytes())
        time.sleep(SHORT_S * 1.2)
        again = json.loads((folder_of(root / "file") / "exclusive").read_bytes())
        assert again["count"] > foreign_process["count"]
        with pytest.raises(BlockingIOError):
            lease.lease(root / "file")
        assert not lock.lost


@pytest.mark.parametrize(("store", "shared"), [("memory", False), ("s3", True)])
def test_a_lease_that_another_machine_does_not_renew_ends_after_its_seconds(
    store: str, shared: bool, request: pytest.FixtureRequest
) -> None:
    root: StorePath = request.getfixturevalue(store)
    held = lease.lease(root / "file", shared)
    held.owned.stop.set()  # its thread ends, as with a dead owner
    file = next(folder_of(root / "file").iterdir())
    foreign(file)
    started = time.monotonic()
    with lease.lease(root / "file", wait=True):
        assert time.monotonic() - started > SHORT_S * 0.9
    assert list(root.rglob("*")) == []


def test_of_another_machine_without_a_clock_a_lock_that_does_not_wait_finds_out(memory: StorePath) -> None:
    held = lease.lease(memory / "file")
    held.owned.stop.set()
    foreign(folder_of(memory / "file") / "exclusive")
    started = time.monotonic()
    with lease.lease(memory / "file"):
        assert SHORT_S * 0.9 < time.monotonic() - started < SHORT_S * 4


def test_a_renewed_lease_of_another_machine_is_refused_at_once(s3: StorePath) -> None:
    with lease.lease(s3 / "file"):
        foreign(folder_of(s3 / "file") / "exclusive", seconds=60)
        started = time.monotonic()
        with pytest.raises(BlockingIOError):
            lease.lease(s3 / "file")
        assert time.monotonic() - started < SHORT_S * 0.9


def test_one_that_was_taken_over_is_lost(root: StorePath) -> None:
    with lease.lease(root / "file") as mine:
        mine.owned.stop.wait(0)
        file = folder_of(root / "file") / "exclusive"
        file.write_bytes(json.dumps({"owner": "another", "seconds": 60}).encode())
        deadline = time.monotonic() + 5 * SHORT_S
        while not mine.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert mine.lost
    assert json.loads(file.read_bytes())["owner"] == "another", "a release leaves another's alone"


def test_an_owner_whose_machine_has_slept_asks_whether_its_lease_is_lost(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 60.0)
    awake = lease._now
    with lease.lease(memory / "file") as lock:
        (folder_of(memory / "file") / "exclusive").write_bytes(b'{"owner": "another", "seconds": 60}')
        monkeypatch.setattr(lease, "_now", lambda: awake() + 60)
        assert lock.lost


def test_a_store_that_is_gone_for_longer_takes_no_lease_away(
    through_proxy: StorePath, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(patience.TIMEOUT, "10")
    monkeypatch.setattr(lease, "BUSY_FACTOR", 1)  # as between two machines
    with ThreadPoolExecutor(1) as pool:
        with lease.lease(through_proxy / "file") as lock:
            other = pool.submit(lease.lease, through_proxy / "file", wait=True)
            time.sleep(0.1)
            proxy.stop()
            time.sleep(SHORT_S * 1.2)
            assert not lock.owned.lost
            proxy.start()
            deadline = time.monotonic() + 10
            while lock.owned.age() > SHORT_S and time.monotonic() < deadline:
                time.sleep(0.05)
            assert lock.owned.age() < SHORT_S, "renewed again"
            assert not lock.lost
            assert not other.done()
        other.result().release()


def test_a_renewal_that_was_done_and_not_answered_takes_no_lease_away(
    through_proxy: StorePath, proxy: FaultProxy
) -> None:
    file = folder_of(through_proxy / "file") / "exclusive"
    with lease.lease(through_proxy / "file") as lock:
        before = file.read_bytes()
        proxy.fault = lambda method, path: "lost" if method == "PUT" else None
        lock.owned.renew()
        assert file.read_bytes() != before
        proxy.fault = lambda method, path: None
        lock.owned.renew()
        assert lock.owned.age() < SHORT_S
        assert not lock.lost
    assert not file.exists()


def test_time_in_which_nothing_was_read_does_not_count(memory: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    file, clock = memory / "exclusive", [1000.0]
    content = json.dumps({"owner": "x", "host": "elsewhere", "boot": "other", "seconds": 30.0}).encode()
    file.write_bytes(content)
    monkeypatch.setattr(lease, "_now", lambda: clock[0])
    watch = lease.Watch(wait=True)

    def dead_after(seconds: float) -> bool:
        clock[0] += seconds
        return watch.is_dead(file, content, "v")

    assert [dead_after(seconds) for seconds in (0, 5, 5, 100, 9, 9, 9)] == [False] * 7
    assert dead_after(9)
    monkeypatch.setattr(lease, "age_of", lambda path: 1000.0)  # as of any lease after a long outage
    assert not lease.Watch(wait=False).is_dead(file, content, "v")


def test_a_running_process_of_this_machine_may_be_too_busy_to_renew(memory: StorePath) -> None:
    with lease.lease(memory / "file") as held:
        held.owned.stop.set()  # its thread gets no turn
        watch = lease.Watch(wait=True)
        file = folder_of(memory / "file") / "exclusive"
        content = file.read_bytes()
        for _ in range(6):
            assert not watch.is_dead(file, content, "v")
            time.sleep(SHORT_S / 5)
        foreign(file)
        assert watch.is_dead(file, file.read_bytes(), "v")


def test_readers_and_a_writer_exclude_each_other_under_load(root: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 6.0)  # a machine under load renews late
    state, guard, faults = {"readers": 0, "writers": 0, "held": 0}, threading.Lock(), []

    def work(number: int) -> None:
        shared = number % 3 != 0
        with lease.lease(root / "file", shared, wait=True):
            with guard:
                state["readers" if shared else "writers"] += 1
                state["held"] += 1
                if state["writers"] > 1 or (state["writers"] and state["readers"]):
                    faults.append(dict(state))
            time.sleep(0.02)
            with guard:
                state["readers" if shared else "writers"] -= 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(12)))
    assert (faults, state["held"]) == ([], 12)


def test_of_a_reader_and_a_writer_that_do_not_wait_at_least_one_gets_it(root: StorePath) -> None:
    def attempt(shared: bool) -> bool:
        try:
            lease.lease(root / "file", shared).release()
        except BlockingIOError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for _ in range(6):
            assert any(list(pool.map(attempt, (True, False))))


HOLDS = """
import os, sys, time
from pipeline.storage import lease
from pipeline.storage.store_path import place
held = lease.lease(place(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        try:
            assert started.stdout.readline()
            yield started
        finally:
            started.kill()


def test_the_lease_of_a_process_ends_with_it(s3: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 60.0)
    with process(HOLDS, s3 / "file") as owner:
        with pytest.raises(BlockingIOError):
            lease.lease(s3 / "file", shared=True)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        started = time.monotonic()
        lease.lease(s3 / "file", shared=True).release()
        assert time.monotonic() - started < 5, "its process is known to be dead"
    with process(HOLDS, s3 / "file") as owner:
        assert owner.stdin
        owner.stdin.close()
        assert owner.wait(20) == 0
        assert list(s3.rglob("*")) == [], "released at exit"


def write_folder(folder: StorePath, number: int, count: int = 4) -> dict[str, bytes]:
    content = {f"part-{index}": b"%d" % number for index in range(count)} | {f"sub/only-{number}": b"%d" % number}
    content["manifest.json"] = json.dumps({"number": number, "files": sorted(content)}).encode()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return content


def committed(folder: StorePath) -> dict[str, bytes] | None:
    """What a reader takes: the files of the manifest; None where there is none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        return None
    return {name: (folder / name).read_bytes() for name in manifest["files"]}


@pytest.mark.parametrize("before", [False, True])
def test_a_commit_that_is_stopped_at_any_call_shows_no_mixture_and_is_done_again(
    before: bool, memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, calls = storage_of(memory), 0
    system = type(memory.system)
    limit = [10**9]

    class Killed(BaseException):
        pass

    def counted(name: str) -> Any:
        real = getattr(system, name)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if ".lease" not in str(arguments[1]):
                calls += 1
                if calls > limit[0]:
                    raise Killed
            return real(*arguments, **named)

        return call

    for name in ("cp_file", "rm_file", "rm", "pipe_file"):
        monkeypatch.setattr(system, name, counted(name))
    stopped = 0
    for most in range(0, 40):
        staging, final = memory / f"{most}" / "staging", memory / f"{most}" / "final"
        limit[0] = 10**9
        old = write_folder(final, 1) if before else None
        new = write_folder(staging, 2)
        calls, limit[0] = 0, most
        try:
            storage.commit(staging, final)
            limit[0] = 10**9
        except Killed:
            stopped += 1
        limit[0] = 10**9
        whole = {name: data for name, data in new.items() if name != "manifest.json"}
        earlier = {name: data for name, data in old.items() if name != "manifest.json"} if old else None
        assert committed(final) in (None, whole, earlier)
        if (staging / "manifest.json").exists():
            storage.commit(staging, final)
        assert {str(f.relative_to(final)): f.read_bytes() for f in final.rglob("*") if f.is_file()} == new
    assert stopped > 6


def test_of_two_writers_one_commits_and_the_other_is_refused(s3: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 20.0)
    storage, barrier = storage_of(s3), threading.Barrier(2)
    real = objects.copy_all

    def slow(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        time.sleep(0.5)

    monkeypatch.setattr(objects, "copy_all", slow)
    content = {number: write_folder(s3 / f"staging-{number}", number) for number in (1, 2)}

    def commit(number: int) -> str:
        barrier.wait()
        try:
            storage.commit(s3 / f"staging-{number}", s3 / "final")
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(commit, (1, 2)))
    assert sorted(map(bool, answers)) == [False, True]
    assert "being written by another process" in "".join(answers)
    winner = answers.index("") + 1
    found = {f.relative_to(s3 / "final").as_posix(): f.read_bytes() for f in (s3 / "final").rglob("*") if f.is_file()}
    assert found == content[winner]


def test_a_commit_whose_lease_was_taken_over_stops_before_the_manifest(memory: StorePath, monkeypatch: Any) -> None:
    write_folder(memory / "staging", 1)
    real = objects.copy_all

    def stolen(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        (folder_of(memory / "final") / "exclusive").write_bytes(b'{"owner": "another", "seconds": 60}')
        time.sleep(SHORT_S)

    monkeypatch.setattr(objects, "copy_all", stolen)
    with pytest.raises(UserError, match="another process"):
        storage_of(memory).commit(memory / "staging", memory / "final")
    assert committed(memory / "final") is None


def test_a_commit_whose_lease_was_taken_over_copies_nothing_more(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(memory / "staging", 1)
    monkeypatch.setattr(store_path, "CALLS_AT_ONCE", 1)
    system = type(memory.system)
    real, copied = system.cp_file, []

    def stolen(self: Any, source: str, target: str, **named: Any) -> None:
        real(self, source, target, **named)
        copied.append(target)
        (folder_of(memory / "final") / "exclusive").write_bytes(b'{"owner": "another", "seconds": 60}')
        time.sleep(SHORT_S)

    monkeypatch.setattr(system, "cp_file", stolen)
    with pytest.raises(UserError, match="another process"):
        storage_of(memory).commit(memory / "staging", memory / "final")
    assert len(copied) == 1


def test_who_may_only_read_reads_without_a_lock_and_is_told(
    through_proxy: StorePath, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    file = through_proxy / "file"
    file.write_bytes(b"x")
    proxy.fault = lambda method, path: 403 if method == "PUT" else None
    with storage_of(file).lock(file, shared=True) as lock:
        assert not lock.lost
    assert "read without a lock" in caplog.text
    with pytest.raises(PermissionError):
        storage_of(file).lock(file)


def test_a_forked_process_leaves_its_parents_lease_alone(memory: StorePath) -> None:
    held = lease.lease(memory / "file")
    process = os.fork()
    if not process:
        held.release()
        os._exit(0 if (folder_of(memory / "file") / "exclusive").exists() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    held.release()


STAGES = """
import sys
from pipeline.storage.staging import recover, staging_of
from pipeline.storage.store_path import place
with staging_of(place(sys.argv[1])) as staging:
    (staging / "file").write_bytes(b"x")
    print("staged", flush=True)
    sys.stdin.read()
"""


def test_the_staging_folder_of_a_killed_process_is_removed_and_a_running_ones_is_not(s3: StorePath) -> None:
    with process(STAGES, s3 / "out") as owner:
        with staging_of(s3 / "out") as mine:
            (mine / "file").write_bytes(b"x")
            assert len([path for path in s3.glob("out.staging-*") if path.is_dir()]) == 2
        assert len([file for file in s3.rglob("*") if file.name == "file"]) == 1
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with staging_of(s3 / "out"):
            assert [file for file in s3.rglob("*") if file.name == "file"] == []
    assert [path for path in s3.rglob("*") if path.is_file()] == []


def test_a_staging_folder_that_was_taken_for_a_dead_ones_is_not_committed(memory: StorePath) -> None:
    with staging_of(memory / "out") as staging:
        write_folder(staging, 1)
        (folder_of(staging) / "exclusive").write_bytes(b'{"owner": "another", "seconds": 60}')
        (staging / "part-0").unlink()
        time.sleep(SHORT_S)
        with pytest.raises(UserError, match="another process"):
            storage_of(memory).commit(staging, memory / "out")
    assert committed(memory / "out") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError, SystemExit])
def test_a_commit_that_fails_half_way_is_ended_by_the_next_job(
    error: type[BaseException], memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = memory / "out"
    write_folder(out, 1)
    real, copied = objects.copy_all, []

    def stopped(pairs: Any, **named: Any) -> None:
        copied.extend(pairs[:2])
        real(pairs[:2], **named)
        raise error

    def stage() -> None:
        with staging_of(out) as staging:
            content.update(write_folder(staging, 2))
            storage_of(memory).commit(staging, out)

    content: dict[str, bytes] = {}
    monkeypatch.setattr(objects, "copy_all", stopped)
    with pytest.raises(UserError if error is PermissionError else error):
        stage()
    assert (len(copied), committed(out)) == (2, None)
    with pytest.raises(UserError if error is PermissionError else error):
        recover(out)  # fails as the first
    monkeypatch.undo()
    recover(out)
    assert {str(f.relative_to(memory)): f.read_bytes() for f in memory.rglob("*") if f.is_file()} == {
        f"out/{name}": data for name, data in content.items()
    }


def test_only_a_commit_that_has_begun_is_ended_by_the_next_job(memory: StorePath) -> None:
    for name in ("out.staging-" + "a" * 32, "out.staging-" + "b" * 32):
        write_folder(memory / name, 1)
    (memory / ("out.staging-" + "b" * 32) / objects.COMMITTING).write_bytes(b"")
    write_folder(memory / "out", 2)  # another was faster
    recover(memory / "out")
    assert {path.name for path in memory.iterdir()} == {"out"}
    assert (memory / "out" / "part-0").read_bytes() == b"2"
    write_folder(memory / ("out.staging-" + "c" * 32), 3)
    remove_tree(memory / "out")
    recover(memory / "out")
    assert not memory.exists(), "no commit of it had begun"


def test_a_staging_folder_that_is_half_deleted_is_not_committed(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left = memory / "out", memory / ("out.staging-" + "a" * 32)

    def half(folder: StorePath) -> None:
        (folder / "part-0").unlink()
        raise KeyboardInterrupt

    write_folder(left, 1)
    (left / objects.COMMITTING).write_bytes(b"")
    write_folder(out, 2)  # it was committed, and another over it
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.storage.staging.remove_tree", half)
        with pytest.raises(KeyboardInterrupt):
            recover(out)
    assert left.exists()
    remove_tree(out)
    recover(out)
    assert not memory.exists()


@pytest.mark.parametrize("job", ["predict", "export", "relabel"])
def test_every_job_that_writes_a_folder_ends_the_commit_before_it(job: str, memory: StorePath, tmp_path: Path) -> None:
    from pipeline.evaluation.relabel import RelabelConfig, relabel
    from pipeline.release.export.config import ExportConfig, check_out
    from pipeline.release.predict.config import PredictConfig
    from pipeline.release.predict.predict import predict

    out, staging = memory / "out", memory / ("out.staging-" + "a" * 32)
    write_folder(staging, 1)
    (staging / objects.COMMITTING).write_bytes(b"")
    (out / "part-0").write_bytes(b"1")
    named: dict[str, Any] = {"out": out, "dataset": tmp_path, "predictions": tmp_path, "run": tmp_path}
    call, config = {
        "predict": (predict, PredictConfig.model_construct(**named)),
        "export": (check_out, ExportConfig.model_construct(**named)),
        "relabel": (relabel, RelabelConfig.model_construct(**named)),
    }[job]
    with pytest.raises(UserError, match=r"is there already|exists"):
        call(config)  # type: ignore[operator]
    assert committed(out) is not None
    assert {path.name for path in memory.iterdir()} == {"out"}
