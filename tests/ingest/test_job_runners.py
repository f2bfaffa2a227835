"""The same dataset, byte for byte, from every runner: this process, its workers, and Beam's own job service."""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.runners import runner as beam_runner
from ingest_runs import ENVIRONMENT, SMALL_SIZES, content_of, refused, run

from pipeline.ingest import progress, workers
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.messages import Failure, MergeWork, Piece, WriteWork
from pipeline.ingest.runners import pipelines
from pipeline.ingest.runners.registry import RUNNERS, check_runner, pipeline_on

pytestmark = pytest.mark.integration

SIZES = SMALL_SIZES


# Names of Beam that may change with a version of it


@pytest.mark.parametrize("name", ["portable", "flink", "dataflow"])
def test_beam_knows_its_own_registered_runners(name, tmp_path):
    check_runner(name)
    wanted = RUNNERS[name].args[0]
    assert type(beam_runner.create_runner(wanted)).__name__ == wanted


def test_the_direct_runner_is_the_one_that_needs_no_network(tmp_path):
    config = PreprocessConfig(input="in", out=tmp_path, workers=2)
    assert type(pipeline_on(config).runner).__name__ == "FnApiRunner"
    assert type(pipeline_on(config.model_copy(update={"runner": "portable"})).runner).__name__ == "PortableRunner"


def test_importing_the_job_leaves_logging_as_it_was_and_is_silent():
    code = """
import logging
import pipeline.ingest.job, pipeline.ingest.runners.pipelines, sys
root, beam = logging.getLogger(), logging.getLogger("apache_beam")
print(root.handlers, root.filters, root.manager.disable, beam.level, "apache_beam" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[] [] 0 0 True\n", "")


# The same bytes


def test_beams_runner_writes_the_bytes_of_steps_that_are_done_in_a_loop(in_a_loop, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "out", small_content(), **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop
    assert len([name for name in in_a_loop if name.startswith("train/")]) == 3


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.system)])
def test_beams_counters_are_the_sums_of_the_manifest(count, small_log, small_content, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pipelines, "pipeline_on", lambda config: made.append(pipeline_on(config)) or made[-1])
    log = shutil.copytree(small_log, tmp_path / "log")
    with (log / "clicks-2.csv").open("a") as clicks:
        clicks.write("7,no number\n")
    manifest = run(log, tmp_path / "out", small_content(), workers=count, max_bad_fraction=0.1, **SIZES)
    found = made[0].result.metrics().query(MetricsFilter().with_namespace("taskfuse"))
    counters: Counter[str] = Counter()  # Beam counts for each transform apart
    for each in found["counters"]:
        counters[each.key.metric.name] += each.committed
    written = {name.removeprefix("rows_written_"): n for name, n in counters.items() if name.startswith("rows_written")}
    read = {name.removeprefix("rows_read_"): n for name, n in counters.items() if name.startswith("rows_read")}
    assert (read, written) == (manifest.read, manifest.rows)
    assert counters["dead_letters"] == sum(manifest.dead_letters.values()) == 1
    assert counters["bytes_read"] == sum(path.stat().st_size for path in log.iterdir())
    assert counters["pieces_write"] == len(manifest.shards)
    times = {each.key.metric.name: each.committed for each in found["distributions"]}
    steps = ["read", "join", "label", "merge", "encode", "write"]
    assert {name: each.count for name, each in times.items()} == {
        f"milliseconds_{step}": counters[f"pieces_{step}"] for step in steps
    }
    assert times["milliseconds_read"].sum > 0


def test_an_engine_shows_each_step_under_its_name(small_log, small_content, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pipelines, "pipeline_on", lambda config: made.append(pipeline_on(config)) or made[-1])
    run(small_log, tmp_path / "out", small_content(), **SIZES)
    labels = [part.full_label for step in made[0].transforms_stack[0].parts[1].parts for part in step.parts]
    parts = ["spread", "do", "gather", "plan"]
    steps = ["read", "join", "label", "merge", "encode", "write"]
    assert labels == [f"taskfuse/{step}/{part}" for step in steps for part in parts]


def test_worker_processes_begin_with_the_largest_shards_then_in_the_order_of_the_work(monkeypatch):
    submitted = []

    class Recorder:
        def submit(self, step: str, number: int, work: Any) -> Future:
            submitted.append(number)
            future: Future = Future()
            future.set_result(Failure("none"))
            return future

    monkeypatch.setattr(workers, "RUNNING", [Recorder()])
    for step, wanted in (("write", [3, 0, 2, 1]), ("merge", [0, 1, 2, 3])):
        rows = [200, 100, 200, 300]
        work = [
            WriteWork("train", [[Piece("a", 0, 50)], [Piece("b", 0, n - 50)]], "path")
            if step == "write"
            else MergeWork([])
            for n in rows
        ]
        fn = pipelines.StepFn(lambda *_: None, step)
        fn.start_bundle()
        for number in (1, 3, 0, 2):  # as a shuffle has them
            assert not list(fn.process((number, work[number])))
        made = [each.value[0] for each in fn.finish_bundle()]
        assert made == wanted == submitted[-4:]


def test_progress_is_logged_step_by_step(small_log, small_content, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lines.append)
    run(small_log, tmp_path / "out", small_content(), **SIZES)
    size = sum(path.stat().st_size for path in small_log.iterdir()) / 1e6
    assert [line[:8].strip() for line in lines] == ["read", "join", "label", "merge", "encode", "write"]
    assert re.fullmatch(rf"read      {size:.1f}/{size:.1f} MB  \d+\.\d MB/s  \d+\.\d s", lines[0])
    assert all(re.fullmatch(r"\w+ +(\d+)/\1  \d+\.\d s", line) for line in lines[1:])
    assert logging.getLogger("apache_beam").level == logging.NOTSET


def test_a_line_of_progress_has_the_share_done_the_rate_and_the_time_left():
    assert progress.line("read", 30_000_000, 71_400_000, 2) == "read      30.0/71.4 MB  15.0 MB/s  left 3 s"
    assert progress.line("encode", 3, 8, 6) == "encode    3/8  left 10 s"
    assert progress.line("encode", 8, 8, 6) == "encode    8/8  6.0 s"


@pytest.mark.system
def test_two_workers_write_the_bytes_of_one(in_a_loop, small_log, small_content, tmp_path):
    run(small_log, tmp_path / "out", small_content(), workers=2, **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop


@pytest.mark.system
def test_what_a_library_prints_in_a_worker_is_no_report(in_a_loop, small_log, small_content, tmp_path, monkeypatch):
    script = (
        "from pipeline.ingest import steps, workers\n"
        "read = steps.STEPS['read']\n"
        "def chatty(job, work):\n"
        "    print('hello', flush=True)\n"
        "    return read(job, work)\n"
        "steps.STEPS['read'] = chatty\n"
        "workers.main()"
    )
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    run(small_log, tmp_path / "out", small_content(), workers=2, **SIZES)
    assert content_of(tmp_path / "out") == in_a_loop


@pytest.mark.system
def test_a_worker_that_is_killed_ends_the_job_in_one_line(small_log, small_content, tmp_path, monkeypatch):
    script = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    message = refused(small_log, tmp_path / "out", small_content(), workers=2, **SIZES)
    assert message.startswith(
        "a worker process ended in step read (signal 9). Nothing was written: run again, with fewer "
    )
    assert not workers.RUNNING


@pytest.mark.system
def test_a_worker_that_lives_and_sends_no_report_ends_the_job_in_one_line(
    small_log, small_content, tmp_path, monkeypatch
):
    script = "import sys\nprint('hello', flush=True)\nsys.stdin.read()"
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    message = refused(small_log, tmp_path / "out", small_content(), workers=2, **SIZES)
    assert message.startswith("a worker process ended in step read (signal 9). Nothing was written: run again")
    assert not workers.RUNNING


@pytest.mark.system
def test_a_defect_in_a_worker_is_raised_where_the_job_is(small_log, small_content, tmp_path, monkeypatch):
    script = (
        "from pipeline.ingest import steps, workers\n"
        "class Odd(Exception):\n"
        "    def __init__(self, message, column): super().__init__(message)\n"  # cannot be unpickled
        "def fail(job, work): raise Odd('what', 'c')\n"
        "steps.STEPS['merge'] = fail\n"
        "workers.main()"
    )
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    with pytest.raises(Exception, match=r"in a worker process, step merge: [\s\S]*what"):
        run(small_log, tmp_path / "out", small_content(), workers=2, **SIZES)
    assert list(tmp_path.iterdir()) == []


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
