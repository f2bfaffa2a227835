"""A connection to a Spark cluster, and its errors in one line each.

Workers need a Python of the driver's version with the packages that taskfuse depends on. It is the driver's PYSPARK_PYTHON, a
path on the workers, or else has the path of the driver's own. taskfuse itself is sent to them: all run the driver's code.
"""

import importlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import UserError, one_line

if TYPE_CHECKING:
    from pyspark import SparkContext

WAIT = (
    "spark.taskfuse.wait"  # seconds for a master and the first executor, once Java runs; more where applications queue
)
WAIT_S = "25"
ANSWER_S = 5  # for a connection to a master
SENT = ("features", "models", "pipeline")  # packages that workers get from the driver
SETTINGS = {"spark.ui.showConsoleProgress": "false", WAIT: WAIT_S}


def settings_of(options: Sequence[str]) -> dict[str, str]:
    """Spark's configuration from `options`. Raises UserError for what is none."""
    found = {}
    for option in options:
        name, separator, value = option.removeprefix("--conf").lstrip(" =").partition("=")
        if not separator or not re.fullmatch(r"spark\.[\w.\-]+", name):
            raise UserError(f"options: {option}: with runner=spark each is a setting, as spark.executor.memory=4g")
        found[name] = value
    if not re.fullmatch(r"\d{1,6}", found.get(WAIT, WAIT_S)):
        raise UserError(f"options: {WAIT}={found[WAIT]}: it is a number of seconds")
    return found


def check_master(master: str | None) -> None:
    """Raises UserError where PySpark is missing, or no master listens: Spark alone would try for a minute, silently."""
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise UserError("runner=spark needs PySpark, of the cluster's version: pip install 'taskfuse[spark]'") from None
    if master and re.fullmatch(r"local(\[(\d+|\*)(, *\d+)?\])?", master):
        return
    if not master or not re.fullmatch(r"spark://[\w.\-]+:\d+(,[\w.\-]+:\d+)*", master):
        raise UserError(
            f"master={master or ''}: runner=spark needs the address of a master, as master=spark://HOST:7077"
        )
    errors = []
    for address in master.removeprefix("spark://").split(","):
        host, _, port = address.partition(":")
        try:
            socket.create_connection((host, int(port)), ANSWER_S).close()
            return
        except (OSError, OverflowError) as error:
            errors.append(f"{address}: {one_line(error)}")
    raise UserError(f"master={master}: no Spark master answers ({'; '.join(errors)}). Start it, or correct master=.")


@contextmanager
def application(master: str, settings: dict[str, str]) -> Iterator["SparkContext"]:
    """An application of the cluster that has an executor.

    Raises:
        UserError: Spark does not start, or there is no executor in time.
    """
    settings = SETTINGS | _worker_environment() | settings | {"spark.master": master}
    with tempfile.TemporaryDirectory() as folder:
        with _process_unchanged(settings.get("spark.pyspark.python")):
            java(settings)
            deadline = time.monotonic() + int(settings[WAIT])
            context = _context(settings, deadline)
        try:
            with _process_unchanged():
                context.addPyFile(str(_zipped(Path(folder))))
            _wait_for_executor(context, deadline, settings[WAIT])
            yield context
        finally:
            with suppress(Exception):  # it may be gone
                context.stop()


def _worker_environment() -> dict[str, str]:
    """Packages that the driver finds by PYTHONPATH, workers find so too."""
    return {"spark.executorEnv.PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}


@contextmanager
def _process_unchanged(python: str | None = None) -> Iterator[None]:
    """Undoes what PySpark does to this process: a handler of SIGINT, paths of modules that are gone when the job ends, logs.

    Args:
        python: the path of the workers' Python; None: PYSPARK_PYTHON, or that of this one.
    """
    modules, before = sys.path[:], os.environ.get("PYSPARK_PYTHON")
    in_main_thread, handler = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    root, nowhere = logging.getLogger(), logging.NullHandler()

    def is_ours(record: logging.LogRecord) -> bool:  # what py4j logs is raised too
        return "py4j" not in record.pathname

    os.environ["PYSPARK_PYTHON"] = python or before or sys.executable
    root.addHandler(nowhere)  # it would add one itself
    root.addFilter(is_ours)
    try:
        yield
    finally:
        root.removeFilter(is_ours)
        root.removeHandler(nowhere)
        sys.path[:] = modules
        os.environ.pop("PYSPARK_PYTHON")
        if before is not None:
            os.environ["PYSPARK_PYTHON"] = before
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _context(settings: dict[str, str], deadline: float) -> "SparkContext":
    """Starts Spark and registers with the master. Raises UserError."""
    from py4j.protocol import Py4JError, Py4JJavaError
    from pyspark import SparkConf, SparkContext

    gateway, late = java(settings), threading.Event()

    def give_up() -> None:
        late.set()
        gateway.proc.kill()  # it would try again, for longer

    watch = threading.Timer(deadline - time.monotonic(), give_up)
    watch.start()
    try:
        return SparkContext(conf=SparkConf().setAll([*settings.items()]), gateway=gateway)
    except (Py4JError, OSError, AttributeError, ValueError) as error:  # the last where this process has one already
        if late.is_set():
            raise UserError(
                f"{settings['spark.master']} answers, but has registered no application within {settings[WAIT]} s. Is it the "
                f"port of a Spark master, of PySpark's version {_version()}?"
            ) from None
        message = error.java_exception.getMessage() if isinstance(error, Py4JJavaError) else error
        raise UserError(f"runner=spark: Spark does not start: {one_line(Exception(message))}") from None
    finally:
        watch.cancel()


def java(settings: dict[str, str]) -> Any:
    """The Java process of this one, which later applications use too; it ends with this process. Raises UserError."""
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException
    from pyspark.java_gateway import launch_gateway

    running = SparkContext._gateway
    if running is not None and running.proc.poll() is None:
        return running
    SparkContext._gateway = SparkContext._jvm = None
    logging.getLogger("py4j").setLevel(logging.CRITICAL)
    # What is set here is a default of all later applications.
    own = SparkConf(loadDefaults=False).setAll(
        [each for each in settings.items() if each[0].startswith("spark.driver.")]
    )
    # Spark logs each lost task, with a stack trace; what matters is raised.
    log = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        return launch_gateway(own, {"stdout": log, "stderr": log})
    except (PySparkException, OSError) as error:
        log.seek(0)
        said = log.read(10_000).decode(errors="replace").strip().splitlines()
        reason = said[0] if said else one_line(error)
        raise UserError(
            f"runner=spark: Java does not start: {reason}. Install Java 8, 11 or 17, or set JAVA_HOME"
        ) from None


def _version() -> str:
    import pyspark

    return pyspark.__version__


def _zipped(folder: Path) -> Path:
    """The code of this job, as workers import it."""
    archive = folder / "taskfuse.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in SENT:
            package = Path(next(iter(importlib.import_module(name).__path__)))
            for path in sorted(package.rglob("*.py")):
                file.write(path, str(path.relative_to(package.parent)))
    return archive


def _wait_for_executor(context: "SparkContext", deadline: float, seconds: str) -> None:
    if str(context.master).startswith("local"):
        return
    spark = context._jsc.sc()
    while len(spark.statusTracker().getExecutorInfos()) < 2:  # the driver is one
        if spark.isStopped() or time.monotonic() > deadline:
            raise UserError(
                f"{context.master} has given no executor within {seconds} s. Its page shows why: no worker is alive, none has "
                f"the cores and spark.executor.memory free ({WAIT}=600 waits longer), or they cannot reach spark.driver.host."
            )
        time.sleep(0.1)


@contextmanager
def explained(step: str) -> Iterator[None]:
    """Raises what stops a job of Spark without Java's stack traces: UserError, or a defect's traceback from the worker."""
    from py4j.protocol import Py4JError, Py4JJavaError

    try:
        yield
    except Py4JJavaError as error:
        raise explanation(str(error.java_exception.getMessage()), step) from None
    except (Py4JError, OSError) as error:
        raise UserError(f"step {step}: Spark's driver has ended: {one_line(error)}. Nothing was written.") from None


def explanation(message: str, step: str) -> Exception:
    """What a message of Spark's scheduler means."""
    lost = re.search(r"Lost task \S+ in stage \S+ \(TID \d+\) \((\S+) executor (\S+)\): (.*)", message, re.S)
    if not lost:
        return UserError(f"step {step}: Spark stopped it: {_first_line(message)}. Nothing was written.")
    host, executor, reason = lost.groups()
    traceback = re.search(r"Traceback \(most recent call last\):\n.*?(?=\n\n|\n\tat |$)", reason, re.S)
    if not traceback:
        return UserError(
            f"step {step}: worker {host}, executor {executor}: {_first_line(reason)}. Nothing was written."
        )
    said = traceback[0].strip().splitlines()[-1]
    if "PYTHON_VERSION_MISMATCH" in said or said.startswith(("ModuleNotFoundError", "ImportError")):
        return UserError(
            f"worker {host}: {said.partition(': ')[2]}. Its Python must be {sys.version_info[0]}.{sys.version_info[1]}, as the "
            "driver's, with the packages that taskfuse needs: set PYSPARK_PYTHON to its path."
        )
    return RuntimeError(f"on worker {host}, step {step}: {traceback[0]}")


def _first_line(message: str) -> str:
    return one_line(Exception(message.partition("\n")[0]))
