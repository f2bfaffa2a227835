"""Beam as this release needs it. With its unstable names, and tests/ingest/test_beam_compat.py."""

import argparse
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from features.errors import UserError, one_line


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Drops what Beam logs while it is imported: warnings about cloud clients that are not installed.

    It calls logging.warning, which installs a handler of the root logger unless it has one, hence the NullHandler.
    """
    root, handler = logging.getLogger(), logging.NullHandler()

    def is_ours(record: logging.LogRecord) -> bool:
        return "apache_beam" not in record.pathname

    root.addHandler(handler)
    root.addFilter(is_ours)
    try:
        yield
    finally:
        root.removeFilter(is_ours)
        root.removeHandler(handler)


with _quiet_import():
    import apache_beam as beam
    import grpc
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # not documented
    from apache_beam.runners.runner import create_runner  # documented as internal
    from apache_beam.transforms.window import GlobalWindows
    from apache_beam.utils.windowed_value import WindowedValue
    from grpc import RpcError

__all__ = [
    "FnApiRunner", "GlobalWindows", "PipelineOptions", "RpcError", "WindowedValue", "beam", "create_runner", "errors_only",
]  # fmt: skip


@contextmanager
def errors_only() -> Iterator[None]:
    """Beam logs every stage of a pipeline."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass
class Flags:
    """Flags of Beam's command line.

    Attributes:
        known: values by name. unknown: `--NAME` of those that no options class of Beam has.
        names: all that Beam has, as `--NAME`. fault: a value of the wrong type, or none.
    """

    known: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    fault: str | None = None


def flags_of(words: Sequence[str]) -> Flags:
    """What Beam's parser makes of flags; it would end the process at a bad value, and log unknown ones."""
    parsers: list[argparse.ArgumentParser] = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=parsers.append)
    names = re.findall(r"--\w+", parsers[0].format_usage())

    def fail(message: str) -> NoReturn:
        raise ValueError(message)

    parsers[0].error = fail  # type: ignore[method-assign]
    try:
        known, unknown = parsers[0].parse_known_args(list(words))
    except ValueError as error:
        return Flags(names=names, fault=one_line(error))
    return Flags(vars(known), [word.partition("=")[0] for word in unknown if word.startswith("-")], names)


def options_of_job_server(endpoint: str, seconds: float) -> set[str]:
    """The names of a job server's own options. Raises TimeoutError where nothing that speaks gRPC answers."""
    from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

    with grpc.insecure_channel(endpoint) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
            request = beam_job_api_pb2.DescribePipelineOptionsRequest()
            answer = beam_job_api_pb2_grpc.JobServiceStub(channel).DescribePipelineOptions(request, timeout=seconds)
        except (grpc.FutureTimeoutError, grpc.RpcError):
            raise TimeoutError from None
        return {option.name for option in answer.options}


def details_of(error: RpcError) -> str:
    """What a gRPC call failed of, in one line."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    return f"{code().name} {' '.join((details() or '').split())[:200]}" if code and details else one_line(error)


def serve_beam_pool(host: str, port: int) -> None:
    """A worker pool of Beam's, with this python where Beam starts the first `python` on PATH. Does not return.

    Raises:
        UserError: it cannot listen, or `python` beside this one is another.
    """
    from apache_beam.portability.api import beam_fn_api_pb2_grpc
    from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
    from apache_beam.utils import thread_pool_executor

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("python")
    if found is None or not Path(found).samefile(sys.executable):
        raise UserError(
            f"{Path(sys.executable).parent} has no `python`, which Beam starts its workers with: use a venv"
        )
    server = grpc.server(thread_pool_executor.shared_unbounded_instance())
    servicer = BeamFnExternalWorkerPoolServicer(use_process=True)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(servicer, server)
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise UserError(f"cannot listen on {host}:{port}: {one_line(error)}") from None
    server.start()
    logging.getLogger(__name__).info(
        "Beam's worker pool, Beam %s, listening on %s:%d  it asks nobody who connects", beam.__version__, host, bound
    )
    server.wait_for_termination()
