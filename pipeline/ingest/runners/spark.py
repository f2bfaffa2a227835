"""runner=spark: the job on a standalone Spark cluster, through PySpark alone.

See spark_translation for what becomes of a pipeline, spark_tasks for what runs on a worker, spark_cluster for the connection.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from features.errors import UserError
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.runners import spark_cluster, spark_tasks
from pipeline.ingest.runners.beam_compat import PipelineOptions, beam
from pipeline.ingest.runners.spark_compat import (
    DistributionResult,
    MetricResult,
    MetricResults,
    PipelineResult,
    PipelineRunner,
    PipelineState,
)
from pipeline.ingest.runners.spark_tasks import Bundle, Measured
from pipeline.ingest.runners.spark_translation import Collection, transforms_of, translate

if TYPE_CHECKING:
    from pyspark import SparkContext


def pipeline_on_spark(config: PreprocessConfig) -> beam.Pipeline:
    """An empty pipeline on the cluster at `master`. Raises UserError for settings that are wrong, or where nobody answers."""
    settings = spark_cluster.settings_of(config.options)
    settings = {"spark.app.name": f"taskfuse {config.out}"} | settings
    spark_cluster.check_master(config.master)
    return beam.Pipeline(SparkRunner(str(config.master), settings), options=PipelineOptions([]))


class SparkRunner(PipelineRunner):
    """Runs a pipeline to its end, as one Spark application.

    Args:
        master: as spark://HOST:7077, or local[N].
        settings: of Spark's configuration.
    """

    def __init__(self, master: str, settings: dict[str, str]) -> None:
        self.master, self.settings = master, settings

    def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> "SparkResult":  # noqa: ARG002
        """Raises UserError where the cluster cannot be used, or a step raises one."""
        measured = Measured()
        transforms = transforms_of(pipeline)
        with spark_cluster.application(self.master, self.settings) as context:
            translate(transforms, partial(run_steps, context, measured))
        return SparkResult(measured)


def run_steps(context: "SparkContext", measured: Measured, collection: Collection) -> list[list[Any]]:
    """The elements of each bundle after its steps; what these measured is added to `measured`."""
    labels = " | ".join(dict.fromkeys(step.label for step in collection.steps))
    if collection.on_driver:
        try:
            made = [spark_tasks.run_bundle(collection.steps, bundle) for bundle in collection.bundles]
        finally:
            spark_tasks.unload()
    elif collection.bundles:
        made = _on_workers(context, collection, labels)
    else:
        made = []
    if failures := [bundle.failure for bundle in made if bundle.failure]:
        raise UserError(failures[0])
    for bundle in made:
        measured.add(bundle.measured.counters, bundle.measured.distributions)
    return [bundle.elements for bundle in made]


def _on_workers(context: "SparkContext", collection: Collection, labels: str) -> list[Bundle]:
    """One job of Spark, a task a bundle; its pages name it by the labels."""
    context.setJobGroup(labels, labels)
    task = partial(spark_tasks.run_task, collection.steps, spark_tasks.installed())
    with spark_cluster.explained(labels):
        return context.parallelize(collection.bundles, len(collection.bundles)).setName(labels).map(task).collect()


class SparkResult(PipelineResult):
    """Of a pipeline that has ended."""

    def __init__(self, measured: Measured) -> None:
        super().__init__(PipelineState.DONE)
        self.measured = measured

    def wait_until_finish(self, duration: int | None = None) -> str:  # noqa: ARG002
        """Its state: it has ended."""
        return self.state

    def metrics(self) -> "SparkMetrics":
        """Its counters and distributions."""
        return SparkMetrics(self.measured)


class SparkMetrics(MetricResults):
    """Metrics of a pipeline, those of attempts whose result was not taken left out."""

    def __init__(self, measured: Measured) -> None:
        self.measured = measured

    def query(self, filter: Any = None) -> dict[str, list[MetricResult]]:
        """Counters and distributions that match a filter; gauges and sets of strings are not kept."""
        counters = self.measured.counters
        distributions = {key: DistributionResult(data) for key, data in self.measured.distributions.items()}
        found = [
            [MetricResult(key, value, value) for key, value in each.items() if self.matches(filter, key)]
            for each in (counters, distributions)
        ]
        return {self.COUNTERS: found[0], self.DISTRIBUTIONS: found[1], self.GAUGES: [], self.STRINGSETS: []}
