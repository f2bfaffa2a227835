"""The runners by name: a function that makes an empty pipeline on each. Another one is one more entry."""

from collections.abc import Callable
from functools import partial

from features.errors import UserError, one_line
from pipeline.ingest import workers
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.runners.beam_compat import FnApiRunner, PipelineOptions, beam, create_runner


def _direct(config: PreprocessConfig) -> beam.Pipeline:
    """Not Beam's DirectRunner, which first tries to fetch another runner from the network."""
    return beam.Pipeline(FnApiRunner(), options=PipelineOptions(config.options))


def _of_beam(name: str, config: PreprocessConfig) -> beam.Pipeline:
    """One of Beam's own runners, with its flags."""
    return beam.Pipeline(name, options=PipelineOptions(config.options))


def _hosts(config: PreprocessConfig) -> beam.Pipeline:
    """As the direct one; the work of its steps is done by worker pools (see hosts.connected)."""
    if not workers.RUNNING:
        raise UserError("runner=hosts: this job has no workers on other hosts. Use direct.")
    return _direct(config)


def _spark(config: PreprocessConfig) -> beam.Pipeline:
    from pipeline.ingest.runners.spark import pipeline_on_spark

    return pipeline_on_spark(config)


# Any other name is taken as that of one of Beam's runners.
RUNNERS: dict[str, Callable[[PreprocessConfig], beam.Pipeline]] = {
    "direct": _direct,
    "hosts": _hosts,
    "spark": _spark,
    "portable": partial(_of_beam, "PortableRunner"),
    "flink": partial(_of_beam, "FlinkRunner"),
    "dataflow": partial(_of_beam, "DataflowRunner"),
}


def check_runner(name: str) -> None:
    """Raises UserError for a runner that does not exist, or is known to lose rows."""
    if name.lower().startswith("dask"):
        raise UserError(
            "runner=dask: Beam's Dask runner mixes tagged outputs up and loses others without an error. Use direct."
        )
    if name in RUNNERS:
        return
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"runner={name}: {one_line(error)}. Use one of {', '.join(RUNNERS)}.") from None


def pipeline_on(config: PreprocessConfig) -> beam.Pipeline:
    """An empty pipeline on the configured runner. Raises UserError where it cannot be reached."""
    make = RUNNERS.get(config.runner) or partial(_of_beam, config.runner)
    return make(config)
