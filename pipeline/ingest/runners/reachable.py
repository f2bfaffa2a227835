"""What can be said before a pipeline starts, or soon after, instead of minutes of silence: flags that Beam does not know,
flags and paths that a runner needs, a job endpoint that does not answer, workers that never begin."""

import importlib.util
import logging
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from features.errors import UserError, did_you_mean, join_faults, one_line
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.runners import beam_compat, spark_cluster
from pipeline.ingest.runners.hosts import Address, address, addresses
from pipeline.ingest.runners.pool import is_loopback
from pipeline.storage.store_path import on_store

logger = logging.getLogger(__name__)

CONNECT_S, ANSWER_S = 5.0, 8.0  # of a job endpoint: until it must be connected, and have answered
BEGIN_S = 25.0  # after which workers that have not begun are worth a line
OF_BEAM = {"portable": "PortableRunner", "flink": "FlinkRunner", "dataflow": "DataflowRunner"}
HERE = ("[local]", "[auto]", "local", "auto")  # in place of a Flink cluster's address: one in this process
NEAR = 0.85  # difflib's ratio of a flag to the one that was meant
DATAFLOW_NEEDS = ("project", "region", "temp_location")


def check_reachable(config: PreprocessConfig) -> None:
    """Raises UserError for settings of a runner that cannot work, and for an endpoint that does not answer."""
    if config.runner == "hosts":
        addresses(config.hosts)
    elif config.hosts:
        raise UserError(f"hosts: runner={config.runner} has none. Set runner=hosts.")
    if config.runner == "spark":
        spark_cluster.settings_of(config.options)
        spark_cluster.check_master(config.master)
        warn_of_paths(config, str(config.master))
        return
    if config.master is not None:
        raise UserError(f"master: runner={config.runner} has none. Set runner=spark.")
    flags = beam_compat.flags_of(config.options)
    described = set()
    endpoint = flags.known.get("job_endpoint")
    if endpoint and endpoint != "embed":
        described = _described(config.runner, address(endpoint, "options: --job_endpoint"))
    _check_flags(config.runner, flags, described)
    name = OF_BEAM.get(config.runner, config.runner)
    if name == "DataflowRunner":
        _check_dataflow(config, flags)
    elif name in ("PortableRunner", "FlinkRunner"):
        _check_portable(name, flags)
        warn_of_paths(config, endpoint or flags.known.get("flink_master") or "")


def _check_flags(runner: str, flags: beam_compat.Flags, described: set[str]) -> None:
    """Raises UserError for a flag that neither Beam nor the job server knows, or a value of the wrong type."""
    if flags.fault:
        raise UserError(f"options: {flags.fault}")
    known = [*flags.names, *(f"--{each}" for each in described)]
    for name in flags.unknown:
        if name.removeprefix("--") in described:
            continue
        # The flags of a job server that does not run yet are not known here: only a near miss is one.
        if OF_BEAM.get(runner, runner) != "FlinkRunner" or described or get_close_matches(name, known, 1, NEAR):
            raise UserError(f"options: Beam has no flag {name}{did_you_mean(name, known)}")
        logger.warning("options: Beam's Python has no flag %s: it is passed on to the job server", name)


def _check_dataflow(config: PreprocessConfig, flags: beam_compat.Flags) -> None:
    missing = [f"--{name}=" for name in DATAFLOW_NEEDS if not flags.known.get(name)]
    image = ("sdk_container_image", "setup_file", "extra_packages")
    if not any(flags.known.get(name) for name in image):
        missing.append("--sdk_container_image= (of k8s/Dockerfile: Beam's own image lacks taskfuse)")
    if missing:
        raise UserError(f"runner=dataflow: options lacks {join_faults(missing)}")
    if not str(flags.known["temp_location"]).startswith("gs://"):
        raise UserError(f"runner=dataflow: --temp_location={flags.known['temp_location']} is no gs:// URL")
    if local := _local_places(config):
        raise UserError(
            f"runner=dataflow: its workers do not see {join_faults(local)}: give URLs, such as gs://BUCKET/folder"
        )
    if importlib.util.find_spec("apitools") is None:
        raise UserError("runner=dataflow: Beam's client is not installed: pip install 'apache-beam[gcp]'")


def _check_portable(name: str, flags: beam_compat.Flags) -> None:
    """What workers Beam would start: its own image of them, the default, lacks taskfuse."""
    master = flags.known.get("flink_master") or "[auto]"
    kind, config = flags.known.get("environment_type"), flags.known.get("environment_config")
    if name == "PortableRunner" and not flags.known.get("job_endpoint"):
        raise UserError("runner=portable: options lacks --job_endpoint=HOST:8099")
    if kind in (None, "DOCKER") and not config and not (name == "FlinkRunner" and master in HERE):
        raise UserError(
            'options: Beam\'s own image of workers lacks taskfuse. Add "--environment_type=EXTERNAL","--environment_config='
            'localhost:50000" where each worker machine runs python -m pipeline.ingest.runners.pool --beam'
        )
    if kind == "EXTERNAL" and not str(config or "").startswith("{"):
        address(str(config or ""), "options: --environment_config")
    if name == "FlinkRunner" and not flags.known.get("job_endpoint"):
        if not flags.known.get("flink_submit_uber_jar") and not shutil.which("java"):
            raise UserError("runner=flink: no java on PATH, which Beam's job server needs")
        if master not in HERE:
            connect(address(master.rpartition("//")[2], "options: --flink_master"), "--flink_master")


def warn_of_paths(config: PreprocessConfig, elsewhere: str) -> None:
    """One line where workers of other machines are given paths of mounted file systems."""
    host = elsewhere.rpartition("//")[2].rpartition(":")[0]
    if host and not is_loopback(host) and (local := _local_places(config)):
        logger.warning(
            "runner=%s: %s must be mounted at the same path on all workers; where it is not, give URLs", config.runner,
            join_faults(local),
        )  # fmt: skip


def _local_places(config: PreprocessConfig) -> list[str]:
    """What workers must see and is not on a store: with `scratch` on one, the driver alone writes to `out`."""
    found = [f"input={config.input}"] if "://" not in config.input else []
    if config.scratch is None or not on_store(config.scratch):
        named = {"out": config.out, "scratch": config.scratch}
        found += [f"{name}={path}" for name, path in named.items() if path is not None and not on_store(path)]
    return found


def connect(to: Address, setting: str) -> None:
    """Raises UserError where nobody listens."""
    try:
        socket.create_connection((to.host, to.port), CONNECT_S).close()
    except socket.gaierror:
        raise UserError(f"{setting}={to.text}: no such host") from None
    except TimeoutError:
        raise UserError(f"{setting}={to.text} does not answer within {CONNECT_S:.0f} s") from None
    except OSError as error:
        raise UserError(f"{setting}={to.text}: {one_line(error)}: nothing listens there") from None


def _described(runner: str, endpoint: Address) -> set[str]:
    """The options of a job server of Beam's. Raises UserError where there is none."""
    connect(endpoint, f"runner={runner}: --job_endpoint")
    try:
        return beam_compat.options_of_job_server(f"{endpoint.text}", ANSWER_S)
    except TimeoutError:
        raise UserError(
            f"runner={runner}: --job_endpoint={endpoint.text} accepts connections and is no job server of Beam: it does not "
            f"answer within {ANSWER_S:.0f} s"
        ) from None


@contextmanager
def watched(config: PreprocessConfig, progress: Path) -> Iterator[None]:
    """Warns where no worker has begun after BEGIN_S; an endpoint that is gone becomes a UserError.

    Args:
        progress: the folder in which workers record what they do.
    """
    ended = threading.Event()
    if config.runner in ("direct", "hosts", "spark"):
        yield
        return
    watch = threading.Thread(target=_warn_of_silence, args=(config, progress, ended), daemon=True)
    watch.start()
    try:
        yield
    except beam_compat.RpcError as error:
        flags = beam_compat.flags_of(config.options)
        endpoint = flags.known.get("job_endpoint") or flags.known.get("flink_master") or "its job server"
        raise UserError(
            f"runner={config.runner}: {endpoint} is gone: {beam_compat.details_of(error)}. Nothing was written."
        ) from None
    except RuntimeError as error:
        if "job server jar" not in str(error):
            raise
        raise UserError(
            f"runner={config.runner}: Beam's job server could not be fetched: {one_line(error)}. Start one and add "
            '"--job_endpoint=HOST:8099", or add "--flink_job_server_jar=FILE". Nothing was written.'
        ) from None
    finally:
        ended.set()
        watch.join()


def _warn_of_silence(config: PreprocessConfig, progress: Path, ended: threading.Event) -> None:
    if ended.wait(BEGIN_S):
        return
    try:
        begun = any(progress.glob("read-*"))
    except OSError:  # a store that is gone for a while, which the steps bear or report
        return
    if begun:
        return
    flags = beam_compat.flags_of(config.options)
    where = flags.known.get("environment_config")
    pool = (
        f": is a pool at {where}, as seen from the workers' machines? It must have Beam and taskfuse: start it with "
        "python -m pipeline.ingest.runners.pool --beam"
        if where and flags.known.get("environment_type") == "EXTERNAL"
        else ""
    )
    logger.warning("runner=%s: no worker has begun after %.0f s%s", config.runner, BEGIN_S, pool)
