"""Names of Beam that may change with a version of it: these fail loudly on an upgrade."""

from concurrent import futures

import apache_beam
import grpc
import pytest
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

from pipeline.ingest.runners import beam_compat
from pipeline.ingest.runners.beam_compat import FnApiRunner, beam, flags_of, options_of_job_server

pytestmark = pytest.mark.integration


def test_the_version_that_was_tested():
    """A new one: run the ingest tests marked system, and runners/README.md's table, then change this line."""
    assert apache_beam.__version__.split(".")[:2] == ["2", "77"]


def test_the_direct_runner_runs_the_primitives_of_the_job(tmp_path):
    with beam.Pipeline(FnApiRunner(), options=beam_compat.PipelineOptions([])) as pipeline:
        spread = pipeline | beam.Create([(0, "a"), (1, "b")]) | beam.Reshuffle()
        listed = spread | beam.CombineGlobally(beam.combiners.ToListCombineFn())
        listed | beam.FlatMap(sorted) | beam.Map(lambda each: (tmp_path / each[1]).touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_windowed_value_of_the_global_window_can_be_made():
    value = beam_compat.GlobalWindows.windowed_value(3)
    assert isinstance(value, beam_compat.WindowedValue)
    assert value.value == 3


def test_all_flags_of_beam_are_known_by_name_and_others_are_not():
    found = flags_of(
        ["--job_endpoint=h:1", "--flink_master", "h:2", "--extra_package=a", "--no_such=3", "--nor_this", "x"]
    )
    assert found.known["job_endpoint"] == "h:1"
    assert found.known["flink_master"] == "h:2"
    assert found.known["extra_packages"] == ["a"]
    assert found.unknown == ["--no_such", "--nor_this"]
    assert found.fault is None
    wanted = {"project", "region", "temp_location", "sdk_container_image", "setup_file", "environment_type",
              "environment_config", "flink_submit_uber_jar", "job_endpoint", "flink_master", "extra_packages"}  # fmt: skip
    assert found.known.keys() >= wanted
    assert {"--parallelism", "--sdk_worker_parallelism"} <= set(found.names)
    assert "--parallelism" in str(flags_of(["--parallelism=x"]).fault)


def test_a_job_server_lists_its_options():
    class Server(beam_job_api_pb2_grpc.JobServiceServicer):
        def DescribePipelineOptions(self, request, context):
            option = beam_job_api_pb2.PipelineOptionDescriptor(name="operator_chaining")
            return beam_job_api_pb2.DescribePipelineOptionsResponse(options=[option])

    server = grpc.server(futures.ThreadPoolExecutor(1))
    beam_job_api_pb2_grpc.add_JobServiceServicer_to_server(Server(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert options_of_job_server(f"127.0.0.1:{port}", 5) == {"operator_chaining"}
    finally:
        server.stop(None)
    with pytest.raises(TimeoutError):
        options_of_job_server(f"127.0.0.1:{port}", 0.3)


def test_beams_worker_pool_starts_processes_with_the_python_of_the_path():
    """serve_beam_pool puts this python first on PATH: of no use where Beam names another command."""
    import inspect

    from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer as Servicer

    assert "use_process" in inspect.signature(Servicer).parameters
    assert "'python'," in inspect.getsource(Servicer.StartWorker)
