"""Prometheus: the newest figures of a job over HTTP, to watch it and to raise alerts.

Names follow https://prometheus.io/docs/practices/naming: base units, `_seconds`, `_ratio`; a figure that is not defined is NaN.
"""

from collections.abc import Callable
from math import nan
from typing import Any

from features.errors import UserError, one_line
from pipeline.run.headline import HEADLINE
from pipeline.run.tracking.base import TRAIN, Committed, EvalRecord, Event, Job, Record, Sink, State, TrainRecord
from pipeline.run.tracking.settings import TrackingSettings

HINT = "pip install 'prometheus-client>=0.20,<1', or leave metrics_port out"
TRAIN_GAUGES = {
    "step": ("taskfuse_train_step", "Steps trained."),
    "rows": ("taskfuse_train_rows", "Rows trained on."),
    "rows_per_s": ("taskfuse_train_rows_per_second", "Rows trained on in a second, over the last record."),
    "data_wait": ("taskfuse_train_data_wait_ratio", "Share of time spent waiting for data, over the last record."),
    "loss": ("taskfuse_train_loss", "Weighted loss over the last record's steps."),
    "seconds_left": ("taskfuse_train_left_seconds", "Time until the last step at the present rate."),
    "time": ("taskfuse_train_record_timestamp_seconds", "When the last record was written, since 1970."),
}
TRAIN_TASK_GAUGES = {
    "ne": ("taskfuse_train_ne", "Normalized entropy of the last record's rows, before they were trained on."),
    "task_loss": ("taskfuse_train_task_loss", "Loss of the last record's rows, before they were trained on."),
}
EVAL_GAUGES = {
    "time": ("taskfuse_eval_record_timestamp_seconds", "When the last record was written, since 1970."),
    "seconds": ("taskfuse_eval_duration_seconds", "Time that the last evaluation took."),
    "rows_per_s": ("taskfuse_eval_rows_per_second", "Rows scored in a second, over the last evaluation."),
}
# Of the newest checkpoint that was evaluated, in whatever order.
LAG_GAUGES = {
    "steps": (
        "taskfuse_eval_lag_steps",
        "Steps of training after the newest evaluated checkpoint when it was recorded.",
    ),
    "seconds": (
        "taskfuse_eval_lag_seconds",
        "Age of the newest evaluated checkpoint when it was recorded, at the trainer's heartbeat; NaN once training has ended.",
    ),
}
EVAL_TASK_GAUGES = {
    "ne": ("taskfuse_eval_ne", "Normalized entropy of a split, of the newest evaluated checkpoint."),
    "nrmse": ("taskfuse_eval_nrmse_ratio", "Root mean squared error over the labels' standard deviation, likewise."),
    "calibration": ("taskfuse_eval_calibration_ratio", "Sum of predictions over that of labels, likewise."),
}


def import_client() -> Any:
    """prometheus_client. Raises UserError where it is not installed."""
    try:
        import prometheus_client
    except ImportError:
        raise UserError(f"metrics_port needs the package prometheus-client: {HINT}") from None
    return prometheus_client


def serve(client: Any, host: str, port: int, registry: Any) -> Callable[[], None]:
    """Starts the endpoint and returns what ends it. Raises UserError where the port cannot be had."""
    try:
        server, thread = client.start_http_server(port, host, registry)
    except OSError as error:  # an unknown host name is one, too
        raise UserError(
            f"metrics_port={port} of metrics_host={host} cannot be listened on: {error.strerror or one_line(error)}. "
            "Choose another, or end what has it."
        ) from None

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end


def check(settings: TrackingSettings) -> None:
    """Raises UserError where the package is missing, or the port cannot be had."""
    if settings.metrics_port is not None:
        client = import_client()
        serve(client, settings.metrics_host, settings.metrics_port, client.CollectorRegistry())()


def open_sink(job: Job, settings: TrackingSettings) -> Sink | None:
    """The sink, None without metrics_port. Raises UserError."""
    return None if settings.metrics_port is None else Prometheus(job, settings.metrics_host, settings.metrics_port)


class Prometheus:
    """Gauges of a job. One appears with its first value: 0 for what is not known would raise alerts."""

    def __init__(self, job: Job, host: str, port: int) -> None:
        self.client = import_client()
        self.registry = self.client.CollectorRegistry()
        self.gauges: dict[str, Any] = {}
        self.newest = -1  # step of the newest evaluated checkpoint
        self.end = serve(self.client, host, port, self.registry)
        if job.series != TRAIN and job.history:
            self._evaluated(max(job.history, key=lambda record: record["step"]))

    def handle(self, event: Event) -> None:
        """Sets the gauges."""
        match event:
            case TrainRecord(record):
                for key, (name, text) in TRAIN_GAUGES.items():
                    self._set(name, text, record.get(key))
                for key, (name, text) in TRAIN_TASK_GAUGES.items():
                    for task, value in record[key].items():
                        self._set(name, text, value, task=task)
            case Committed(step, time):
                self._set("taskfuse_train_checkpoint_step", "Step of the newest checkpoint.", step)
                self._set("taskfuse_train_checkpoint_timestamp_seconds", "When it was written, since 1970.", time)
            case EvalRecord(record):
                self._evaluated(record)

    def close(self, _: State) -> None:
        """Ends the endpoint."""
        self.end()

    def _evaluated(self, record: Record) -> None:
        split = record["split"]
        for key, (name, text) in EVAL_GAUGES.items():
            if key in record:
                self._set(name, text, record[key], split=split)
        if record["step"] < self.newest:
            return
        self.newest = record["step"]
        self._set("taskfuse_eval_step", "Step of the newest evaluated checkpoint.", self.newest, split=split)
        for key, (name, text) in LAG_GAUGES.items():
            if record.get("lag"):
                self._set(name, text, record["lag"].get(key), split=split)
        errors = record.get("intervals") or {}
        for task, metrics in record["metrics"].items():
            for key, (name, text) in EVAL_TASK_GAUGES.items():
                if key in metrics:
                    self._set(name, text, metrics[key], task=task, split=split)
            for key in HEADLINE.values():
                if key in errors.get(task, {}):
                    name, text = f"taskfuse_eval_{key}_standard_error", f"Standard error of {key}."
                    self._set(name, text, errors[task][key], task=task, split=split)

    def _set(self, name: str, text: str, value: float | None, **labels: str) -> None:
        if name not in self.gauges:
            self.gauges[name] = self.client.Gauge(name, text, sorted(labels), registry=self.registry)
        gauge = self.gauges[name].labels(**labels) if labels else self.gauges[name]
        gauge.set(nan if value is None else value)
