"""Beam runners: which there are, and a pipeline on one of them."""

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import create_runner

from features.errors import UserError
from pipeline.ingest import files as raw_files
from pipeline.ingest.config import PreprocessConfig

RUNNERS = {"portable": "PortableRunner", "flink": "FlinkRunner", "spark": "SparkRunner", "dataflow": "DataflowRunner"}


def _check_runner(name: str) -> None:
    """Raises UserError for a runner that does not exist, or is known to lose rows."""
    if name.lower().startswith("dask"):
        raise UserError(
            "runner=dask: Beam's Dask runner mixes tagged outputs up and loses others without an error. Use direct."
        )
    try:
        create_runner(RUNNERS.get(name, "DirectRunner" if name == "direct" else name))
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"runner={name}: {raw_files.one_line(error)}. Use direct, or {', '.join(RUNNERS)}.") from None


def _pipeline(config: PreprocessConfig) -> beam.Pipeline:
    if config.runner != "direct":
        return beam.Pipeline(RUNNERS.get(config.runner, config.runner), options=PipelineOptions(config.options))
    # By name: the default runner first tries to fetch another one from the network.
    many = ["--direct_running_mode=multi_processing", f"--direct_num_workers={config.workers}"]
    return beam.Pipeline(FnApiRunner(), options=PipelineOptions(config.options + (many if config.workers > 1 else [])))
