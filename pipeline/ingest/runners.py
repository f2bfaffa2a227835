"""Beam runners, and the job as a pipeline on one of them. The only file that imports Beam, with its unstable names."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import grpc

from features.errors import UserError, one_line
from pipeline.ingest import schedule
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.messages import Failure, ReadWork, Report, Work
from pipeline.ingest.state import Job
from pipeline.ingest.steps import run_step
from pipeline.malloc import release_memory, tune_malloc
from pipeline.terminal import quiet_children


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
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # not documented
    from apache_beam.runners.runner import create_runner  # documented as internal

# Beam's names of runners; any other name is taken as Beam's own.
RUNNERS = {
    "direct": "FnApiRunner", "portable": "PortableRunner", "flink": "FlinkRunner", "spark": "SparkRunner",
    "dataflow": "DataflowRunner",
}  # fmt: skip


def check_runner(name: str) -> None:
    """Raises UserError for a runner that does not exist, or is known to lose rows."""
    if name.lower().startswith("dask"):
        raise UserError(
            "runner=dask: Beam's Dask runner mixes tagged outputs up and loses others without an error. Use direct."
        )
    try:
        create_runner(RUNNERS.get(name, name))
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"runner={name}: {one_line(error)}. Use one of {', '.join(RUNNERS)}.") from None


def pipeline_on(config: PreprocessConfig) -> beam.Pipeline:
    """An empty pipeline on the configured runner."""
    if config.runner != "direct":
        return beam.Pipeline(RUNNERS.get(config.runner, config.runner), options=PipelineOptions(config.options))
    # Not Beam's DirectRunner, which first tries to fetch another runner from the network.
    return beam.Pipeline(FnApiRunner(), options=PipelineOptions(config.options + worker_flags(config.workers)))


def worker_flags(workers: int) -> list[str]:
    """Flags by which the direct runner starts processes; none for one worker, which is this process."""
    if workers == 1:
        return []
    return ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]


class StepFn(beam.DoFn):
    """(number, work) of a step to (number, report)."""

    def __init__(self, job: Job, step: str) -> None:
        self.job, self.step = job, step

    def setup(self) -> None:
        """Once a worker and step."""
        release_memory()
        tune_malloc()

    def process(self, element: tuple[int, Work]) -> Iterator[tuple[int, Report | Failure]]:
        """Yields one report."""
        number, work = element
        yield number, run_step(self.job, self.step, number, work)


def run_pipeline(config: PreprocessConfig, job: Job, limits: schedule.Limits, units: list[ReadWork]) -> None:
    """Runs all steps in one pipeline; a failure is in the job's scratch folder (see schedule.after)."""
    # Worker processes write to stderr whenever they start and stop; what fails in them is a report.
    quiet = quiet_children() if config.runner == "direct" and config.workers > 1 else nullcontext()
    alone = _on_loopback() if config.runner == "direct" else nullcontext()
    with quiet, alone, _errors_only(), pipeline_on(config) as pipeline:
        work = pipeline | beam.Create(list(enumerate(units)))
        for step in schedule.steps_of(job):
            reports = work | f"spread {step}" >> beam.Reshuffle() | step >> beam.ParDo(StepFn(job, step))
            listed = reports | f"all of {step}" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
            work = listed | f"after {step}" >> beam.FlatMap(schedule.after, job, limits, step)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Servers that Beam starts meanwhile, for worker processes of this machine, listen on 127.0.0.1 only.

    It has no setting for that: they would listen on all interfaces, and exchange pickled functions and rows with anyone who
    connects.
    """
    make = grpc.server

    def on_loopback(*args: Any, **named: Any) -> grpc.Server:
        server = make(*args, **named)
        listen = server.add_insecure_port
        server.add_insecure_port = lambda address: listen(address.replace("[::]", "127.0.0.1"))
        return server

    grpc.server = on_loopback
    try:
        yield
    finally:
        grpc.server = make


@contextmanager
def _errors_only() -> Iterator[None]:
    """Beam logs every stage of a pipeline."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
