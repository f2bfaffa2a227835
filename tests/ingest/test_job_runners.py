"""The same dataset, byte for byte, from every runner: this process, its workers, and Beam's own job service."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ingest_runs import ENVIRONMENT, content_of, no_beam, refused, run

pytestmark = pytest.mark.integration

SIZES = {"rows_per_row_group": 32, "rows_per_shard": 100, "unit_bytes": 8000, "bucket_bytes": 20_000}


@pytest.fixture(scope="module")
def in_a_loop(small_log, small_content, tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a dataset of several units, buckets and shards, made without Beam."""
    out = tmp_path_factory.mktemp("in_a_loop") / "out"
    with no_beam():
        run(small_log, out, small_content(), **SIZES)
    return content_of(out)


def test_beams_runner_writes_the_bytes_of_steps_that_are_done_in_a_loop(in_a_loop, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "out", small_content(), **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop
    assert len([name for name in in_a_loop if name.startswith("train/")]) == 3


@pytest.mark.system
def test_two_workers_write_the_bytes_of_one(in_a_loop, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "out", small_content(), workers=2, **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def served(module: str, port: int, *arguments: str) -> Iterator[None]:
    """A server of Beam's in a process of its own; workers are started as `python`, which must be this one."""
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"}
    command = [sys.executable, "-m", f"apache_beam.runners.{module}", *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, f"{module} ended"
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the pool's workers with it


@pytest.mark.system
def test_beams_job_service_and_its_workers_write_the_same_bytes(in_a_loop, small_log, small_content, tmp_path):
    jobs, pool = free_ports(2)
    options = [
        f"--job_endpoint=127.0.0.1:{jobs}", "--environment_type=EXTERNAL", f"--environment_config=127.0.0.1:{pool}",
        "--sdk_worker_parallelism=2",
    ]  # fmt: skip
    with (
        served("portability.local_job_service_main", jobs, f"--port={jobs}"),
        served("worker.worker_pool_main", pool, f"--service_port={pool}"),
    ):
        run(small_log, tmp_path / "out", small_content(), runner="portable", options=options, **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop


def test_a_failure_in_a_worker_is_the_one_line_of_the_job(small_log, small_content, tmp_path):
    folder = shutil.copytree(small_log, tmp_path / "log")
    (folder / "impressions-2.csv.gz").write_bytes((folder / "impressions-2.csv.gz").read_bytes()[:-20])
    assert "impressions-2.csv.gz: cannot be read" in refused(folder, tmp_path / "out", small_content())


@pytest.mark.parametrize("name", ["dask", "DaskRunner"])
def test_runners_known_to_lose_rows_are_refused(name, small_log, small_content, tmp_path):
    assert "runner=dask" in refused(small_log, tmp_path / "out", small_content(), runner=name)


def test_a_runner_that_does_not_exist_is_refused_in_one_line(small_log, small_content, tmp_path):
    assert "runner=fast" in refused(small_log, tmp_path / "out", small_content(), runner="fast")
