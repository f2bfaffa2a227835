"""Jobs whose store is gone for a while or for good, or that are killed: the same bytes in the end, or one line and nothing."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import yaml
from ingest_runs import ENVIRONMENT, content_of, no_beam, run
from s3_server import S3Server
from store_fixtures import FaultProxy

from features.errors import UserError
from pipeline.ingest import job as ingest_job
from pipeline.ingest.messages import Failure, Report
from pipeline.ingest.steps import reported
from pipeline.storage.store_path import StorePath, files_below

pytestmark = pytest.mark.system

SIZES = {"rows_per_row_group": 32, "rows_per_shard": 100, "unit_bytes": 20_000, "bucket_bytes": 40_000}


def on(folder: StorePath) -> dict[str, bytes]:
    """All files of a folder, by their names."""
    return {str(file).removeprefix(f"{folder}/"): file.read_bytes() for file in files_below(folder)}


def names(folder: StorePath) -> set[str]:
    """Of what lies in a folder; the server lists folders of which no file is left."""
    return {name.partition("/")[0] for name in on(folder)}


@pytest.fixture(scope="module")
def wanted(small_log, small_content, tmp_path_factory) -> dict[str, bytes]:
    """The bytes of the dataset, made on disk."""
    out = tmp_path_factory.mktemp("disk") / "out"
    with no_beam():
        run(small_log, out, small_content(), **SIZES)
    return content_of(out)


@contextmanager
def after_requests(
    proxy: FaultProxy, at: Callable[[str, str], bool], count: int, do: Callable[[], None]
) -> Iterator[None]:
    """Calls something in a thread of its own at the n-th request of a kind."""
    left, threads, lock = [count], list[threading.Thread](), threading.Lock()

    def watch(method: str, path: str) -> None:
        with lock:
            left[0] -= at(method, path)
            if not left[0] and not threads:
                threads.append(threading.Thread(target=do))
                threads[0].start()

    proxy.fault = watch
    try:
        yield
    finally:
        proxy.fault = lambda _method, _path: None
        assert threads, "so many requests are not made"
        threads[0].join()


def put(_: str) -> Callable[[str, str], bool]:
    return lambda method, path: method == "PUT" and _ in path


@pytest.mark.parametrize("scratch", ["store", "disk"])
def test_a_store_that_is_gone_for_a_while_changes_nothing(
    scratch,
    through_proxy: StorePath,
    proxy: FaultProxy,
    s3_server: S3Server,
    small_log,
    small_content,
    wanted,
    tmp_path,
):
    def restart() -> None:
        if scratch == "store":
            s3_server.kill()
            s3_server.start()
        else:
            proxy.stop()
            time.sleep(1)
            proxy.start()

    folder = through_proxy / "scratch" if scratch == "store" else tmp_path / "scratch"
    kind, count = ("scratch", 12) if scratch == "store" else ("part-", 2)
    # On the store with Beam and two workers, which have clients of their own.
    beam, workers = (nullcontext(), 2) if scratch == "store" else (no_beam(), 1)
    with beam, after_requests(proxy, put(kind), count, restart):
        run(small_log, through_proxy / "out", small_content(), scratch=folder, workers=workers, **SIZES)
    assert on(through_proxy / "out") == wanted
    assert names(through_proxy) == {"out"}


def test_a_store_that_stays_away_stops_the_job_with_one_line_and_leaves_the_dataset_before(
    through_proxy: StorePath, proxy: FaultProxy, small_log, small_content, wanted, monkeypatch
):
    out = through_proxy / "out"
    for name, content in wanted.items():
        (out / name).write_bytes(content)
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "1.5")
    with (
        after_requests(proxy, put("scratch"), 12, proxy.stop),
        pytest.raises(
            UserError, match=rf"^{through_proxy}.*: the store has not answered for 1.5 s: .*Run again once it does\.$"
        ) as caught,
    ):
        run(small_log, out, small_content(), seed=1, overwrite=True, **SIZES)
    assert "\n" not in str(caught.value)
    proxy.start()
    assert on(out) == wanted


def test_a_piece_of_work_for_which_a_store_stays_away_fails_with_the_stores_line(memory: StorePath):
    def write() -> Report:
        raise OSError(errno.ETIMEDOUT, "the store has not answered for 9 s: reset", str(memory / "scratch/part"))

    failure = reported(write, memory / "out", memory / "progress", "write", 0)
    assert failure == Failure(
        f"{memory}/scratch/part: the store has not answered for 9 s: reset. Run again once it does."
    )


KILLED = """
import sys
from pathlib import Path
from ingest_runs import no_beam, run
import yaml
from pipeline.storage.store_path import place
log, content, out = sys.argv[1:4]
with no_beam():
    run(Path(log), place(out), yaml.safe_load(Path(content).read_text()), **yaml.safe_load(sys.argv[4]))
"""


def test_a_driver_that_is_killed_while_it_commits_leaves_no_dataset_and_the_next_one_cleans_up(
    through_proxy: StorePath, proxy: FaultProxy, small_log, small_content, wanted, tmp_path
):
    out, schema = through_proxy / "out", tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(small_content(), sort_keys=False))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(small_log), str(schema), str(out), str(SIZES)],
        env=os.environ | {"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]},
    )
    with after_requests(proxy, put(f"{out.key}/"), 3, lambda: process.send_signal(signal.SIGKILL)):
        assert process.wait() == -signal.SIGKILL
    assert len(files_below(through_proxy)) > 3
    assert not (out / "manifest.json").is_file()
    assert files_below(out)
    with no_beam(), pytest.raises(UserError, match="exists"):  # after it has ended what was begun
        run(small_log, out, small_content(), **SIZES)
    assert on(out) == wanted
    assert names(through_proxy) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_jobs_that_write_the_same_dataset_one_wins_the_first_unless_it_may_be_replaced(
    overwrite: bool, memory: StorePath, small_log, small_content, wanted, monkeypatch
):
    out, commits = memory / "out", list[str]()
    whole = ingest_job.commit_job

    def commit_after_another(*given: object) -> object:
        if not commits:
            commits.append("first")
            run(small_log, out, small_content(), **SIZES)
        return whole(*given)

    monkeypatch.setattr(ingest_job, "commit_job", commit_after_another)
    with no_beam(), nullcontext() if overwrite else pytest.raises(UserError, match=rf"^{out} exists\. Choose another"):
        run(small_log, out, small_content(), seed=1, overwrite=overwrite, **SIZES)
    assert on(out).keys() == wanted.keys()
    other = [name for name, content in on(out).items() if wanted[name] != content]
    assert len(other) > 3 if overwrite else not other  # all of it is of one job
    assert names(memory) == {"out"}
