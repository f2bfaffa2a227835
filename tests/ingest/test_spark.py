"""The job on a real Spark cluster: the bytes of the dataset are those of any other runner, whatever dies."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from ingest_runs import ENVIRONMENT, SMALL_SIZES, content_of, no_beam, refused, run
from spark_cluster import SparkCluster, why_not

from pipeline.storage.store_path import files_below

pytestmark = [pytest.mark.system, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SIZES = SMALL_SIZES
# Quick starts rather than speed.
QUICK = ["spark.ui.enabled=false", "spark.taskfuse.wait=100"] + [
    f"spark.{role}.extraJavaOptions=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC" for role in ("driver", "executor")
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, s3_server) -> Iterator[SparkCluster]:
    """Its workers have the credentials of the store in their environment; the job's settings have not."""
    cluster = SparkCluster(tmp_path_factory.mktemp("spark"), s3_server.env)
    try:
        yield cluster.start()
    finally:
        cluster.kill()


@pytest.fixture
def on_spark(cluster, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Settings of a job on the cluster."""
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    return lambda *options: {"runner": "spark", "master": cluster.master, "options": [*QUICK, *options], **SIZES}


def when(seen: Callable[[], Any], then: Callable[[], Any]) -> threading.Thread:
    """Does `then` as soon as something is seen, while the test goes on."""

    def watch() -> None:
        end = time.monotonic() + 120
        while not seen() and time.monotonic() < end:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_an_executor_that_is_killed_in_the_middle_costs_only_its_tasks(
    in_a_loop, small_log, small_content, on_spark, cluster, tmp_path
):
    killed: list[int] = []

    def kill_one() -> None:
        executor = cluster.executors()[0]
        killed.append(executor.pid)
        os.kill(executor.pid, signal.SIGKILL)

    watch = when(lambda: [*tmp_path.rglob("label.total")], kill_one)
    run(small_log, tmp_path / "out", small_content(), **on_spark())
    watch.join()
    assert killed
    assert content_of(tmp_path / "out") == in_a_loop


def test_twins_of_slow_tasks_do_no_harm_and_nothing_is_on_a_shared_disk(
    in_a_loop, small_log, small_content, on_spark, cluster, s3, tmp_path
):
    """Speculation as eager as it can be set, on a store: a task of an executor that stands still for a while, and its twin."""

    def stop_one_for_a_while() -> None:
        stopped = cluster.executors()[0].pid
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(3)
        os.kill(stopped, signal.SIGCONT)

    watch = when(lambda: [file for file in files_below(s3) if file.name == "label.total"], stop_one_for_a_while)
    eager = {"enabled": "true", "multiplier": "1.0", "quantile": "0.1", "interval": "5ms", "minTaskRuntime": "1ms"}
    options = [f"spark.speculation{'' if name == 'enabled' else f'.{name}'}={value}" for name, value in eager.items()]
    events = tmp_path / "events"
    events.mkdir()
    noted = ("spark.eventLog.enabled=true", f"spark.eventLog.dir=file://{events}")
    run(small_log, s3 / "out", small_content(), **on_spark(*options, *noted))
    watch.join()
    files = {str(file).removeprefix(f"{s3}/out/"): file.read_bytes() for file in files_below(s3 / "out")}
    assert files == in_a_loop
    log = "".join(file.read_text() for file in events.iterdir())
    assert '"Speculative":true' in log
    names = dict.fromkeys(re.findall('"spark.job.description":"(.*?)"', log))
    steps = ["read", "join", "label", "merge", "encode", "write"]
    assert [step for step, name in zip(steps, names, strict=True) if step in re.split(r"\W+", name)] == steps


def test_a_driver_that_is_killed_commits_nothing_and_the_next_cleans_up(
    in_a_loop, small_log, small_content, on_spark, cluster, tmp_path
):
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(small_content(), sort_keys=False))
    out = tmp_path / "there" / "out"
    out.parent.mkdir()
    code = (
        "import sys, yaml\nfrom pathlib import Path\nfrom ingest_runs import run\n"
        "_, log, schema, out, settings = sys.argv\n"
        "run(log, Path(out), yaml.safe_load(Path(schema).read_text()), **yaml.safe_load(settings))"
    )
    command = [sys.executable, "-c", code, small_log, tmp_path / "schema.yaml", out, yaml.safe_dump(on_spark())]
    with subprocess.Popen(command, env=ENVIRONMENT | {"SPARK_LOCAL_IP": "127.0.0.1"}) as driver:
        when(lambda: [*out.parent.rglob("encode.total")], driver.kill).join()
    assert driver.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(out.parent.iterdir()) != []  # its staging
    with no_beam():
        run(small_log, out, small_content(), **SIZES)
    assert content_of(out) == in_a_loop
    assert list(out.parent.iterdir()) == [out]


def test_a_python_without_the_packages_is_named_with_its_worker(small_log, small_content, on_spark, tmp_path):
    python = tmp_path / "bare" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    settings = on_spark(f"spark.pyspark.python={python}", "spark.executorEnv.PYTHONPATH=/nowhere")
    began = time.monotonic()
    message = refused(small_log, tmp_path / "out", small_content(), **settings)
    assert time.monotonic() - began < 60  # 30 on a machine that does nothing else
    assert re.match(r"worker 127\.0\.0\.[12]: No module named ", message)
    assert "set PYSPARK_PYTHON" in message


def test_a_cluster_without_room_for_an_executor_ends_the_job_in_time(small_log, small_content, on_spark, tmp_path):
    settings = on_spark("spark.executor.memory=100g", "spark.taskfuse.wait=6")
    message = refused(small_log, tmp_path / "out", small_content(), **settings)
    assert "has given no executor within 6 s" in message


def test_a_server_that_is_no_master_is_given_up_in_time(small_log, small_content, on_spark, tmp_path):
    """The last one: the Java process of all jobs before ends with it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        master = f"spark://127.0.0.1:{server.getsockname()[1]}"
        message = refused(
            small_log, tmp_path / "out", small_content(), **on_spark("spark.taskfuse.wait=3") | {"master": master}
        )
    assert message.startswith(f"{master} answers, but has registered no application within 3 s")
