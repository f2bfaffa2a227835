"""MLflow: parameters, metrics over steps and pages of a run, with a server or a database file.

A run directory is one run of MLflow, whatever trains, resumes or evaluates it: RUN/mlflow.json has an id that the run of MLflow
has as a tag. An experiment is the folder of the run directory. MLflow keeps every value that it was ever sent, so it is asked
first what it has: a step that a resumed training repeats, or a record that is sent again after a kill, is one point.
"""

import hashlib
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from features.errors import UserError
from features.plain_json import read_json, validated
from features.regular_files import lstat_regular
from pipeline.overrides import dotted
from pipeline.run.run import Run
from pipeline.run.tracking import scalars
from pipeline.run.tracking.background import Background
from pipeline.run.tracking.base import (
    TRAIN,
    EvalRecord,
    Event,
    Job,
    Published,
    Record,
    RolledBack,
    Sink,
    State,
    TrainRecord,
)
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.storage.files import write_json
from pipeline.storage.store_path import on_store

IDENTITY = "mlflow.json"
RUN_TAG = "taskfuse.run"
HINT = "pip install 'taskfuse[mlflow]', or set tracking=none"
URI_VARIABLE = "MLFLOW_TRACKING_URI"  # read by MLflow itself
MOST_METRICS, MOST_PARAMS = 1000, 100  # of a request
MAX_KEY, MAX_VALUE = 250, 5000  # characters of a name, and of a parameter or tag
MAX_PENDING = 100_000  # metrics that are kept while MLflow cannot be reached
STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
CREDENTIALS = re.compile(r"//[^/@\s]+@")


class Identity(BaseModel):
    """RUN/mlflow.json: the id by which any MLflow finds the run."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def check(settings: TrackingSettings) -> None:
    """Raises UserError where the package is missing."""
    if settings.tracking == "mlflow":
        import_client()


def open_sink(job: Job, settings: TrackingSettings) -> Sink | None:
    """The sink, None unless tracking=mlflow. Raises UserError where the package is missing."""
    if settings.tracking != "mlflow":
        return None
    return Background("MLflow", Mlflow(job, settings.tracking_uri))


def import_client() -> Any:
    """The module mlflow, which sends nothing but what it is given here. Raises UserError where it is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
        import mlflow.entities
    except ImportError:
        raise UserError(f"tracking=mlflow needs packages that are not installed: {HINT}") from None
    for name in ("mlflow", "alembic"):  # a line for each migration of a new database
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def key_of(*parts: str) -> str:
    """A name that MLflow allows and no other name has: parts between slashes, other characters as their code.

    A part of letters, digits, _, - and blanks stays as it is.
    """
    whole = "/".join(re.sub(r"[^A-Za-z0-9_ -]|_(?=x[0-9a-f]*_)|^ | $|^$", _code, part) for part in parts)
    return (
        whole if len(whole) <= MAX_KEY else f"{whole[: MAX_KEY - 9]}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    )


def default_uri(run: Run) -> str:
    """The database file beside the run's folder. Raises UserError for a run on a store, which has none."""
    if on_store(run.path):
        raise UserError(
            f"{run.path} is on a store, where no database lies: set tracking_uri to an MLflow server, or {URI_VARIABLE}"
        )
    return f"sqlite:///{run.path.absolute().parent / 'mlflow.db'}"


class Mlflow:
    """Sends the events of a job; what fails is sent again with the next event. Calls wait for MLflow: see `Background`.

    Args:
        uri: of the tracking server or database; None: that of the environment, or else `default_uri`.
    """

    def __init__(self, job: Job, uri: str | None) -> None:
        self.job, self.mlflow = job, import_client()
        self.uri = uri or (None if os.environ.get(URI_VARIABLE) else default_uri(job.run))
        self.prefix = TRAIN if job.series == TRAIN else f"eval_{job.split}"
        self.client: Any = None
        self.run_id = ""
        self.sent: dict[str, set[tuple[int, float | None]]] = {}  # by key, as far as it was asked for
        self.pending: list[Any] = []
        self.tags: dict[str, str] = {}
        self.files: list[Path] = []
        for record in job.history:
            self._add(record)

    def handle(self, event: Event) -> None:
        """Sends an event, and what could not be sent before it."""
        match event:
            case TrainRecord(record) | EvalRecord(record):
                self._add(record)
            case RolledBack(step):
                self.tags["taskfuse.rolled_back"] = f"to step {step}: steps repeated since have their first values here"
            case Published(file):
                self.files.append(file)
        self._flush()

    def close(self, state: State) -> None:
        """Sends the rest, and how training ended: the training itself may not have been tracked."""
        self._flush()
        ended: str | None = state
        if self.job.series != TRAIN:
            status = self.job.run.status()
            ended = status.state if status else None
        if ended in STATUS and self._named(self.client.get_run, self.run_id).info.status != STATUS[ended]:
            self._named(self.client.set_terminated, self.run_id, STATUS[ended])

    def _add(self, record: Record) -> None:
        """Queues a record's scalars; of those of another dataset than the run's own the name is the series'."""
        values = scalars.of_training(record) if self.job.series == TRAIN else scalars.of_evaluation(record)
        moment = int(record.get("time", time.time()) * 1000)
        for name, value in values.items():
            name = name.replace(self.prefix, self.job.series, 1)
            self.pending.append(self.mlflow.entities.Metric(key_of(*name.split("/")), value, moment, record["step"]))
        del self.pending[:-MAX_PENDING]

    def _flush(self) -> None:
        if self.client is None:
            self._named(self._connect)
        if self.tags:
            self._named(self._log, tags=[self.mlflow.entities.RunTag(*tag) for tag in self.tags.items()])
            self.tags = {}
        fresh: dict[tuple[str, int, float | None], Any] = {}
        for metric in self.pending:
            if self._point(metric) not in self._sent(metric.key):
                fresh.setdefault((metric.key, *self._point(metric)), metric)
        metrics = list(fresh.values())
        for start in range(0, len(metrics), MOST_METRICS):
            part = metrics[start : start + MOST_METRICS]
            self._named(self._log, metrics=part)
            for metric in part:
                self._sent(metric.key).add(self._point(metric))
        self.pending.clear()
        while self.files:
            if lstat_regular(self.files[0].parent, self.files[0].name) is not None:
                self._named(self._log_page, self.files[0])
            del self.files[0]

    def _point(self, metric: Any) -> tuple[int, float | None]:
        """What is one point: a step of a training, however often it is repeated; a value of an evaluation.

        A checkpoint that was trained anew after a rollback is evaluated anew, and MLflow takes the later value as the newest.
        """
        return metric.step, None if self.job.series == TRAIN else metric.value

    def _sent(self, key: str) -> set[tuple[int, float | None]]:
        if key not in self.sent:
            history = self._named(self.client.get_metric_history, self.run_id, key)
            self.sent[key] = {self._point(metric) for metric in history}
        return self.sent[key]

    def _log(self, metrics: Iterable[Any] = (), params: Iterable[Any] = (), tags: Iterable[Any] = ()) -> None:
        self.client.log_batch(self.run_id, metrics=list(metrics), params=list(params), tags=list(tags))

    def _log_page(self, file: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = file
            if on_store(file):
                local = Path(folder, file.name)
                local.write_bytes(file.read_bytes())
            self.client.log_artifact(self.run_id, str(local))

    def _connect(self) -> None:
        """Finds the run of MLflow, or creates it. Raises what MLflow raises, and UserError."""
        client, run = self.mlflow.MlflowClient(self.uri), self.job.run
        with run.wait_for_lock("mlflow"):
            identity = _identity(run)
            experiment = self._experiment(client)
            found = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'")
            tags = {RUN_TAG: identity, "taskfuse.path": str(run.path.absolute())}
            opened = found[0] if found else client.create_run(experiment, run_name=run.path.absolute().name, tags=tags)
        self.run_id = opened.info.run_id
        if found and self.job.series == TRAIN:
            client.update_run(self.run_id, status="RUNNING")
        wanted = {key_of(k).replace("_x2e_", "."): str(v)[:MAX_VALUE] for k, v in dotted(run.config())}
        known = opened.data.params
        self.client = client
        fresh = [self.mlflow.entities.Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(fresh), MOST_PARAMS):
            self._log(params=fresh[start : start + MOST_PARAMS])
        # MLflow refuses another value of a parameter.
        self.tags |= {f"changed.{k}"[:MAX_KEY]: v for k, v in wanted.items() if known.get(k, v) != v}

    def _experiment(self, client: Any) -> str:
        """The id of the experiment named like the folder of the run; created where there is none. Raises UserError."""
        folder = self.job.run.path.absolute().parent
        name = folder.name or "taskfuse"
        found = client.get_experiment_by_name(name)
        if found is None:
            # MLflow would put the files that go with a database below the current folder.
            with_database = (self.uri or "").startswith("sqlite") and not on_store(folder)
            place = (folder / "mlartifacts" / name).as_uri() if with_database else None
            try:
                return str(client.create_experiment(name, artifact_location=place))
            except self.mlflow.MlflowException:
                found = client.get_experiment_by_name(name)  # of another process, meanwhile
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(f"experiment {name} of MLflow is deleted: restore it, or use another folder of runs")
        return str(found.experiment_id)

    def _named(self, call: Any, *arguments: Any, **named: Any) -> Any:
        """Calls MLflow. Raises UserError with its message, without a password that an address may have."""
        try:
            return call(*arguments, **named)
        except UserError:
            raise
        except Exception as error:
            raise UserError(CREDENTIALS.sub("//…@", f"{type(error).__name__}: {error}")) from None


def _code(found: re.Match[str]) -> str:
    return f"_x{ord(found[0]):x}_" if found[0] else "_x_"


def _identity(run: Run) -> str:
    """The id of RUN/mlflow.json, which is written where there is none. Raises UserError for a damaged one."""
    file = run.path / IDENTITY
    try:
        return validated(Identity, read_json(run.path, IDENTITY, 1 << 12), file).id
    except FileNotFoundError:
        write_json(file, {"id": (identity := uuid.uuid4().hex)})
        return identity
