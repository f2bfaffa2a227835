"""The sinks that there are, and all that a job has as one, whose errors never reach the job."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from features.errors import Preempted, UserError
from pipeline.run.tracking import mlflow, prometheus, tensorboard
from pipeline.run.tracking.background import log_once
from pipeline.run.tracking.base import Event, Job, Sink, State
from pipeline.run.tracking.settings import TrackingSettings

logger = logging.getLogger(__name__)

# None for a sink that the settings leave out.
SINKS: dict[str, Callable[[Job, TrackingSettings], Sink | None]] = {
    "TensorBoard": tensorboard.open_sink,
    "MLflow": mlflow.open_sink,
    "Prometheus": prometheus.open_sink,
}


class Sinks:
    """All sinks of a job. An error of one is logged, each kind once, and costs its curves, not the job."""

    def __init__(self) -> None:
        self.members: dict[str, Sink] = {}
        self.logged: dict[str, set[str]] = {}

    def add(self, name: str, sink: Sink) -> None:
        """Adds a member."""
        self.members[name], self.logged[name] = sink, set()

    def handle(self, event: Event) -> None:
        """Passes an event to each."""
        for name, sink in self.members.items():
            try:
                sink.handle(event)
            except Exception as error:
                log_once(self.logged[name], name, error)

    def close(self, state: State) -> None:
        """Ends each."""
        for name, sink in self.members.items():
            try:
                sink.close(state)
            except Exception as error:
                log_once(self.logged[name], name, error)


def check(settings: TrackingSettings) -> None:
    """Raises UserError where a package is missing or a port is in use, before a job has done any work."""
    mlflow.check(settings)
    prometheus.check(settings)


@contextmanager
def opened(
    job: Job,
    settings: TrackingSettings,
    members: Mapping[str, Callable[[Job, TrackingSettings], Sink | None]] = SINKS,
    into: Sinks | None = None,
) -> Iterator[Sinks]:
    """The sinks that the settings ask for, closed with how the job ended.

    Args:
        members: that there are. into: gets them, if given: an object that others hold already.
    Raises:
        UserError: a folder of the run is a link, a package is missing, or a port is in use.
    """
    sinks = into or Sinks()
    state: State = "failed"
    try:
        for name, open_sink in members.items():
            try:
                if (sink := open_sink(job, settings)) is not None:
                    sinks.add(name, sink)
            except UserError:
                raise
            except Exception as error:  # a full disk, or a line of a damaged file
                log_once(set(), name, error)
        yield sinks
        state = "finished"
    except (Preempted, SystemExit):
        state = "preempted"
        raise
    finally:
        sinks.close(state)
