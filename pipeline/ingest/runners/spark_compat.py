"""What the Spark runner takes of Beam that is not documented. With tests/ingest/test_spark_translation.py."""

from pipeline.ingest.runners.beam_compat import beam  # first: it imports Beam quietly

# isort: split
from apache_beam.internal import pickler
from apache_beam.metrics.cells import DistributionData, DistributionResult
from apache_beam.metrics.execution import MetricKey, MetricResult, MetricsContainer
from apache_beam.metrics.metric import MetricResults
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor
from apache_beam.runners.runner import PipelineResult, PipelineRunner, PipelineState
from apache_beam.runners.worker.statesampler import set_current_tracker
from apache_beam.transforms.window import TimestampedValue

__all__ = [
    "AppliedPTransform", "DistributionData", "DistributionResult", "MetricKey", "MetricResult", "MetricResults",
    "MetricsContainer", "PipelineResult", "PipelineRunner", "PipelineState", "PipelineVisitor", "TimestampedValue",
    "pickler", "set_current_tracker", "takes_parameters",
]  # fmt: skip


def takes_parameters(fn: beam.DoFn) -> bool:
    """Whether a DoFn asks for more than its element: a time, a window, state, a timer, a restriction."""
    kind = type(beam.DoFn.ElementParam)
    methods = ("process", "start_bundle", "finish_bundle")
    return any(isinstance(default, kind) for method in methods for default in fn.get_function_arguments(method)[1])
