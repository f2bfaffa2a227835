"""What is said before a pipeline on another machine starts, or soon after, in place of silence."""

import errno
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from ingest_runs import ENVIRONMENT, refused
from waiting import wait_for

from features.errors import UserError
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.runners import beam_compat, reachable
from pipeline.ingest.runners.reachable import check_reachable, watched

pytestmark = pytest.mark.integration

EXTERNAL = ["--environment_type=EXTERNAL", "--environment_config=localhost:50000"]
DATAFLOW = ["--project=p", "--region=r", "--temp_location=gs://b/tmp", "--sdk_container_image=i"]


def config(runner: str, options: list[str], **settings: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate(
        {"input": "in", "out": "out", "runner": runner, "options": options} | settings
    )


def fault(runner: str, options: list[str], **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_reachable(config(runner, options, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(reachable.logger, "warning", lambda text, *values: found.append(text % values))
    return found


def test_a_job_endpoint_where_nobody_listens_or_answers_stops_the_job_at_once(
    small_log, small_content, tmp_path, monkeypatch
):
    monkeypatch.setattr(reachable, "ANSWER_S", 1.0)
    with silent() as endpoint:
        options = [f"--job_endpoint={endpoint}", *EXTERNAL]
        message = refused(small_log, tmp_path / "out", small_content(), runner="portable", options=options)
        assert f"--job_endpoint={endpoint} accepts connections and is no job server of Beam" in message
    message = refused(small_log, tmp_path / "out", small_content(), runner="portable", options=options)
    assert f"--job_endpoint={endpoint}: Connection refused" in message.replace("[Errno 111] ", "")
    assert "no such host" in fault("portable", ["--job_endpoint=no.such.host.invalid:8099", *EXTERNAL])
    assert reachable.CONNECT_S + 2 * 8 < 30


def test_a_job_server_of_beam_is_asked_for_its_own_flags(monkeypatch):
    monkeypatch.setattr(reachable, "connect", lambda *_: None)
    monkeypatch.setattr(beam_compat, "options_of_job_server", lambda *_: {"operator_chaining"})
    options = ["--job_endpoint=h:1", *EXTERNAL]
    check_reachable(config("portable", [*options, "--operator_chaining=true"]))
    message = fault("portable", [*options, "--operator_chainin=true"])
    assert message == "options: Beam has no flag --operator_chainin (did you mean --operator_chaining?)"


@pytest.mark.parametrize(
    ("runner", "options", "message"),
    [
        ("direct", ["--paralelism=4"], "Beam has no flag --paralelism (did you mean --parallelism?)"),
        ("direct", ["--parallelism=many"], "argument --parallelism: invalid int value: 'many'"),
        ("portable", EXTERNAL, "runner=portable: options lacks --job_endpoint=HOST:8099"),
        ("portable", ["--job_endpoint=here", *EXTERNAL], "options: --job_endpoint: 'here' is not HOST:PORT"),
        ("flink", ["--flink_master=h:1"], "Beam's own image of workers lacks taskfuse"),
        ("flink", [EXTERNAL[0], "--environment_config=here"], "--environment_config: 'here' is not HOST:PORT"),
        ("flink", ["--flink_mster=h:1", *EXTERNAL], "no flag --flink_mster (did you mean --flink_master?)"),
        ("dataflow", [], "lacks --project=; --region=; --temp_location=; --sdk_container_image="),
        ("dataflow", [*DATAFLOW[:2], "--temp_location=/tmp", DATAFLOW[3]], "--temp_location=/tmp is no gs:// URL"),
        ("dataflow", DATAFLOW, "its workers do not see input=in; out=out: give URLs"),
    ],
)
def test_flags_that_cannot_work_are_refused_with_what_to_do(runner, options, message):
    assert message in fault(runner, options)


def test_hosts_of_another_runner_are_refused():
    assert fault("direct", [], hosts=["h:1"]) == "hosts: runner=direct has none. Set runner=hosts."


@pytest.mark.parametrize("runner", ["direct", "hosts", "flink"])
def test_a_master_of_another_runner_is_refused_by_the_job(runner, small_log, small_content, tmp_path):
    settings = {"runner": runner, "master": "spark://h:1", "hosts": ["localhost:1"] if runner == "hosts" else []}
    message = refused(small_log, tmp_path / "out", small_content(), **settings)
    assert message == f"master: runner={runner} has none. Set runner=spark."


def test_spark_is_looked_for_before_anything_is_read_and_paths_that_its_workers_may_not_see_are_named(
    small_log, small_content, tmp_path, monkeypatch, warnings
):
    spark = {"runner": "spark", "master": "local[2]"}
    message = refused(tmp_path / "nothing", tmp_path / "out", small_content(), **spark, options=["memory=4g"])
    assert message == "options: memory=4g: with runner=spark each is a setting, as spark.executor.memory=4g"
    message = refused(tmp_path / "nothing", tmp_path / "out", small_content(), runner="spark", master="yarn")
    assert message.startswith("master=yarn: runner=spark needs the address of a master")
    check_reachable(config("spark", [], master="local[2]"))
    assert warnings == []
    monkeypatch.setattr(reachable.spark_cluster, "check_master", lambda _: None)
    check_reachable(config("spark", [], master="spark://127.0.0.1:7077"))
    assert warnings == []
    check_reachable(config("spark", [], master="spark://h1:7077,h2:7077", input="s3://b/in"))
    assert warnings == [
        "runner=spark: out=out must be mounted at the same path on all workers; where it is not, give URLs"
    ]


def test_flags_that_work_are_taken_and_mounted_paths_of_other_machines_are_named(monkeypatch, warnings):
    monkeypatch.setattr(reachable, "connect", lambda *_: None)
    monkeypatch.setattr(reachable.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(reachable.importlib.util, "find_spec", lambda name: name)
    check_reachable(config("dataflow", DATAFLOW, input="gs://b/in", out="gs://b/out"))
    check_reachable(config("flink", ["--flink_master=localhost:8081", *EXTERNAL]))
    assert warnings == []
    remote = ["--flink_master=http://jobs:8081", *EXTERNAL]
    check_reachable(config("flink", remote, input="s3://b/in", scratch="s3://b/scratch"))
    assert warnings == []
    check_reachable(config("flink", remote, out="s3://b/out", scratch="/scratch"))
    assert warnings == [
        "runner=flink: input=in; scratch=/scratch must be mounted at the same path on all workers; where it is not, give URLs"
    ]
    check_reachable(config("flink", [*EXTERNAL, "--flinkConfDir=/etc/flink"]))
    assert warnings[1:] == ["options: Beam's Python has no flag --flinkConfDir: it is passed on to the job server"]


def test_workers_that_do_not_begin_are_worth_a_line_and_those_that_do_are_not(monkeypatch, warnings, tmp_path):
    assert reachable.BEGIN_S < 30
    monkeypatch.setattr(reachable, "BEGIN_S", 0.05)
    with watched(config("portable", EXTERNAL), tmp_path):
        wait_for(lambda: warnings, "the line", 5)
    assert warnings[0].startswith("runner=portable: no worker has begun after 0 s: is a pool at localhost:50000, ")
    (tmp_path / "read-000000").touch()
    with watched(config("portable", EXTERNAL), tmp_path):
        time.sleep(0.3)
    assert len(warnings) == 1


def test_progress_on_a_store_that_is_gone_says_nothing_of_workers(monkeypatch, warnings, memory):
    def gone(_: object, __: str) -> None:
        raise OSError(errno.ETIMEDOUT, "the store has not answered for 9 s")

    monkeypatch.setattr(reachable, "BEGIN_S", 0)
    monkeypatch.setattr(type(memory), "glob", gone)
    reachable._warn_of_silence(config("portable", EXTERNAL), memory, threading.Event())
    assert warnings == []


def test_an_endpoint_that_is_gone_in_the_middle_is_one_line(tmp_path):
    with (
        grpc.insecure_channel("127.0.0.1:1") as channel,
        pytest.raises(UserError, match="runner=portable: h:8099 is gone: UNAVAILABLE"),
        watched(config("portable", ["--job_endpoint=h:8099"]), tmp_path),
    ):
        channel.unary_unary("/any/Call")(b"", timeout=5)


def test_a_job_server_that_cannot_be_fetched_is_one_line_and_a_defect_is_not(tmp_path):
    wanted = r"job server could not be fetched: Unable to fetch .* add \"--job_endpoint="
    with pytest.raises(UserError, match=wanted), watched(config("flink", EXTERNAL), tmp_path):
        raise RuntimeError("Unable to fetch remote job server jar at https://…\nno network")
    with pytest.raises(RuntimeError, match="a defect"), watched(config("flink", EXTERNAL), tmp_path):
        raise RuntimeError("a defect")


def test_beams_pool_starts_this_python_whatever_is_on_the_path(tmp_path):
    """Beam's own starts the first `python` on PATH, which may lack Beam: then nothing happens, and nobody says so."""
    from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc, endpoints_pb2

    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as job:
        port, control = server.getsockname()[1], f"127.0.0.1:{job.getsockname()[1]}"
        server.close()
        command = [sys.executable, "-m", "pipeline.ingest.runners.pool", "--beam", f"--port={port}"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pool:
            try:
                assert f"listening on 127.0.0.1:{port}" in pool.stderr.readline()
                request = beam_fn_api_pb2.StartWorkerRequest(
                    worker_id="one", control_endpoint=endpoints_pb2.ApiServiceDescriptor(url=control)
                )
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel).StartWorker(request, timeout=10)
                job.settimeout(30)
                job.accept()[0].close()  # the worker has imported Beam
            finally:
                pool.terminate()
