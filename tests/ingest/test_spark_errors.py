"""What stops a job on Spark before or while it runs, in one line each; without Spark."""

import socket
import sys
import time

import pytest
from test_job_runners import free_ports

from features.errors import UserError
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.runners import spark_cluster
from pipeline.ingest.runners.registry import pipeline_on
from pipeline.ingest.runners.spark_cluster import explanation, settings_of

ABORTED = "Job aborted due to stage failure: Task 0 in stage 0.0 failed 4 times, most recent failure: "
LOST = ABORTED + "Lost task 0.3 in stage 0.0 (TID 3) "
PYTHON = LOST + (
    "(10.0.0.7 executor 1): org.apache.spark.api.python.PythonException: Traceback (most recent call last):\n"
    '  File "worker.py", line 9, in main\n    process()\n{}\n\n\tat org.apache.spark.api.python.BasePythonRunner\n\tat java'
)


def refusal(tmp_path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        pipeline_on(PreprocessConfig(input="in", out=tmp_path / "out", runner="spark", **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("master", [None, "spark://host", "yarn", "host:7077", "k8s://https://host:443"])
def test_a_master_that_is_none_is_refused(master, tmp_path):
    assert "as master=spark://HOST:7077" in refusal(tmp_path, master=master)


def test_a_master_that_nobody_listens_for_is_named_at_once_and_any_of_several_will_do(tmp_path):
    (port,) = free_ports(1)
    began = time.monotonic()
    message = refusal(tmp_path, master=f"spark://127.0.0.1:{port}")
    assert message.startswith(f"master=spark://127.0.0.1:{port}: no Spark master answers (127.0.0.1:{port}: ")
    assert time.monotonic() - began < 10
    with socket.create_server(("127.0.0.1", 0)) as server:
        spark_cluster.check_master(f"spark://127.0.0.1:{port},127.0.0.1:{server.getsockname()[1]}")


def test_a_missing_pyspark_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    assert "pip install 'taskfuse[spark]'" in refusal(tmp_path, master="local[2]")


def test_options_are_sparks_settings(tmp_path):
    assert settings_of(["spark.executor.memory=4g", "--conf spark.a.b=c=d", "--conf=spark.x=1"]) == {
        "spark.executor.memory": "4g", "spark.a.b": "c=d", "spark.x": "1",
    }  # fmt: skip
    for option in ("--spark_master_url=spark://h:1", "spark.executor.memory", "executor.memory=4g"):
        assert "as spark.executor.memory=4g" in refusal(tmp_path, master="local[2]", options=[option])
    message = refusal(tmp_path, master="local[2]", options=["spark.taskfuse.wait=long"])
    assert message == "options: spark.taskfuse.wait=long: it is a number of seconds"


@pytest.mark.parametrize(
    ("message", "kind", "starts"),
    [
        (PYTHON.format("ModuleNotFoundError: No module named 'polars'"), UserError,
         "worker 10.0.0.7: No module named 'polars'. Its Python must be 3."),
        (PYTHON.format("pyspark.errors.exceptions.base.PySparkRuntimeError: [PYTHON_VERSION_MISMATCH] Python in worker has "
                       "different version (3, 9) than that in driver 3.11"), UserError,
         "worker 10.0.0.7: [PYTHON_VERSION_MISMATCH] Python in worker has different version (3, 9)"),
        (PYTHON.format("ZeroDivisionError: division by zero"), RuntimeError,
         "on worker 10.0.0.7, step read: Traceback (most recent call last):\n"),
        (LOST + "(10.0.0.7 executor 3): ExecutorLostFailure (executor 3 exited caused by one of the running tasks) Reason: "
         "Command exited with code 137\nDriver stacktrace:", UserError,
         "step read: worker 10.0.0.7, executor 3: ExecutorLostFailure (executor 3 exited caused by one of the running tasks) "
         "Reason: Command exited with code 137. Nothing was written."),
        (LOST + '(10.0.0.7 executor 3): java.io.IOException: Cannot run program "/usr/python": error=2, No such file or '
         "directory\n\tat java", UserError,
         'step read: worker 10.0.0.7, executor 3: java.io.IOException: Cannot run program "/usr/python": error=2'),
        ("Job aborted due to stage failure: Master removed our application: FAILED", UserError,
         "step read: Spark stopped it: Job aborted due to stage failure: Master removed our application: FAILED."),
    ],
)  # fmt: skip
def test_what_sparks_scheduler_says_becomes_one_line_that_names_the_worker(message, kind, starts):
    found = explanation(message, "read")
    assert type(found) is kind
    assert str(found).startswith(starts)
    assert "\tat " not in str(found)
    assert kind is RuntimeError or "\n" not in str(found)
