"""Beam runners, and the job as a pipeline on one of them. The only file that imports Beam, with its unstable names."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from features.errors import UserError, one_line
from pipeline.ingest import schedule, workers
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.messages import Failure, ReadWork, Report
from pipeline.ingest.state import Job
from pipeline.ingest.steps import run_step
from pipeline.malloc import release_memory, tune_malloc


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
    from apache_beam.transforms.window import GlobalWindows
    from apache_beam.utils.windowed_value import WindowedValue

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
    return beam.Pipeline(FnApiRunner(), options=PipelineOptions(config.options))


class StepFn(beam.DoFn):
    """(number, work) of a step to (number, report), here or in the worker processes of this job."""

    def __init__(self, do: workers.Do, step: str) -> None:
        self.do, self.step = do, step

    def setup(self) -> None:
        """Once a worker and step."""
        release_memory()
        tune_malloc()

    def start_bundle(self) -> None:
        """Nothing is under way yet."""
        self.submitted: list[tuple[int, Future[Report | Failure]]] = []

    def process(self, element: tuple[int, Any]) -> Iterator[tuple[int, Report | Failure]]:
        """Yields one report, unless worker processes make it."""
        number, work = element
        if workers.RUNNING:
            self.submitted.append((number, workers.RUNNING[-1].submit(self.step, number, work)))
        else:
            yield number, self.do(self.step, number, work)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Yields what worker processes have made."""
        for number, report in self.submitted:
            yield GlobalWindows.windowed_value((number, report.result()))


def run_pipeline(config: PreprocessConfig, job: Job, limits: schedule.Limits, units: list[ReadWork]) -> None:
    """Runs all steps in one pipeline; a failure is in the job's scratch folder (see schedule.after)."""
    with _errors_only(), pipeline_on(config) as pipeline:
        work = pipeline | beam.Create(list(enumerate(units)))
        for step in schedule.steps_of(job):
            listed = _reports(work, partial(run_step, job), step)
            work = listed | f"after {step}" >> beam.FlatMap(schedule.after, job, limits, step)


def run_one_step(
    config: PreprocessConfig,
    do: workers.Do,
    step: str,
    work: Sequence[object],
    after: Callable[[list[tuple[int, Report | Failure]]], Iterable[object]],
) -> None:
    """A pipeline of one step.

    Args:
        config: its runner, and options.
        do: what the step does, pickled for other processes.
        after: is given the numbered reports of all work, once, on a worker.
    """
    with _errors_only(), pipeline_on(config) as pipeline:
        listed = _reports(pipeline | beam.Create(list(enumerate(work))), do, step)
        listed | f"after {step}" >> beam.FlatMap(after)


def _reports(work: beam.PCollection, do: workers.Do, step: str) -> beam.PCollection:
    """The list of a step's numbered reports, from its numbered work."""
    reports = work | f"spread {step}" >> beam.Reshuffle() | step >> beam.ParDo(StepFn(do, step))
    return reports | f"all of {step}" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())


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
