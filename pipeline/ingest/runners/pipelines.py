"""The job as a Beam pipeline, on any runner.

Engines show each step under its name, in four parts: read/spread, read/do, read/gather, read/plan. Nothing but Create,
Reshuffle, ParDo, FlatMap and CombineGlobally is used: the runners of spark.py and hosts.py translate these.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from pipeline.ingest import schedule, workers
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.messages import Failure, ReadWork, Report
from pipeline.ingest.runners.beam_compat import GlobalWindows, WindowedValue, beam, errors_only
from pipeline.ingest.runners.counters import count
from pipeline.ingest.runners.registry import pipeline_on
from pipeline.ingest.state import Job
from pipeline.ingest.steps import run_step
from pipeline.malloc import release_memory, tune_malloc

# From the numbered reports of all pieces of a step, what comes next.
After = Callable[[list[tuple[int, Report | Failure]]], Iterable[Any]]


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
        self.waiting: list[tuple[int, Any]] = []

    def process(self, element: tuple[int, Any]) -> Iterator[tuple[int, Report | Failure]]:
        """Yields one report, unless worker processes make it."""
        number, work = element
        if workers.RUNNING:
            self.waiting.append(element)
        else:
            report = self.do(self.step, number, work)
            count(self.step, report)
            yield number, report

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Yields what worker processes make of the bundle; they begin with the largest pieces, so that none ends late."""
        submitted = [
            (number, workers.RUNNING[-1].submit(self.step, number, work))
            for number, work in sorted(self.waiting, key=lambda element: (-schedule.size_of(element[1]), element[0]))
        ]
        for number, future in submitted:
            report = future.result()
            count(self.step, report)
            yield GlobalWindows.windowed_value((number, report))


class Step(beam.PTransform):
    """A step: its numbered work to what comes after the reports of all of it.

    Args:
        do: what the step does, pickled for other processes.
        after: is given the reports once, on a worker.
    """

    def __init__(self, step: str, do: workers.Do, after: After) -> None:
        super().__init__(step)
        self.step, self.do, self.after = step, do, after

    def expand(self, work: beam.PCollection) -> beam.PCollection:
        """See Step."""
        reports = work | "spread" >> beam.Reshuffle() | "do" >> beam.ParDo(StepFn(self.do, self.step))
        return (
            reports
            | "gather" >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
            | "plan" >> beam.FlatMap(self.after)
        )


class Steps(beam.PTransform):
    """All steps of a job: the numbered units of its raw files to what `after` makes of the last step's reports.

    Args:
        steps: their names, in order.
        do: what they do.
        after: as of a Step, of the step that it is given as `step`.
    """

    def __init__(self, steps: Sequence[str], do: workers.Do, after: Callable[..., Iterable[Any]]) -> None:
        super().__init__()
        self.steps, self.do, self.after = steps, do, after

    def expand(self, work: beam.PCollection) -> beam.PCollection:
        """See Steps."""
        for step in self.steps:
            work = work | Step(step, self.do, partial(self.after, step=step))
        return work


def run_pipeline(config: PreprocessConfig, job: Job, limits: schedule.Limits, units: list[ReadWork]) -> None:
    """Runs all steps in one pipeline; a failure is in the job's scratch folder (see schedule.after)."""
    after = partial(schedule.after, job=job, limits=limits)
    with errors_only(), pipeline_on(config) as pipeline:
        work = pipeline | "units" >> beam.Create(list(enumerate(units)))
        work | "taskfuse" >> Steps(schedule.steps_of(job), partial(run_step, job), after)


def run_one_step(config: PreprocessConfig, do: workers.Do, step: str, work: Sequence[object], after: After) -> None:
    """A pipeline of one step: see Step; `config` has the runner and its options."""
    with errors_only(), pipeline_on(config) as pipeline:
        pipeline | "units" >> beam.Create(list(enumerate(work))) | Step(step, do, after)
