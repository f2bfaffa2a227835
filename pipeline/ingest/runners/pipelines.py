"""The job as a Beam pipeline, on any runner."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from pipeline.ingest import schedule, workers
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.messages import Failure, ReadWork, Report
from pipeline.ingest.runners.beam_compat import GlobalWindows, WindowedValue, beam, errors_only
from pipeline.ingest.runners.reachable import watched
from pipeline.ingest.runners.registry import pipeline_on
from pipeline.ingest.state import Job
from pipeline.ingest.steps import run_step
from pipeline.malloc import release_memory, tune_malloc


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
    with errors_only(), watched(config, job.progress), pipeline_on(config) as pipeline:
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
    with errors_only(), pipeline_on(config) as pipeline:
        listed = _reports(pipeline | beam.Create(list(enumerate(work))), do, step)
        listed | f"after {step}" >> beam.FlatMap(after)


def _reports(work: beam.PCollection, do: workers.Do, step: str) -> beam.PCollection:
    """The list of a step's numbered reports, from its numbered work."""
    reports = work | f"spread {step}" >> beam.Reshuffle() | step >> beam.ParDo(StepFn(do, step))
    return reports | f"all of {step}" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
