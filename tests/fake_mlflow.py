"""A small MLflow in memory, for environments without the package: what taskfuse calls, with MLflow's own rules.

It keeps every metric that it is sent, refuses another value of a parameter, names that it has no place for, and requests that
are too large, as MLflow does (mlflow/utils/validation.py, version 3). tests/pipeline/test_tracking_mlflow.py runs over both.
"""

import re
import sys
import time
import types
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import normpath
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest


class MlflowException(Exception):  # noqa: N818
    pass


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class RunTag(NamedTuple):
    key: str
    value: str


@dataclass
class FakeRun:
    experiment: str
    name: str
    tags: dict[str, str]
    status: str = "RUNNING"
    end_time: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Store:
    """What lies behind one tracking URI."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, FakeRun] = {}


STORES: dict[str, Store] = defaultdict(Store)


def check_name(name: str) -> None:
    """Raises MlflowException for a name that MLflow refuses."""
    if not re.fullmatch(r"[/\w.\- :]{1,250}", name, re.ASCII) or normpath(name) != name or name.startswith((".", "/")):
        raise MlflowException(f"Invalid name {name!r}")


class MlflowClient:
    def __init__(self, tracking_uri: str | None = None) -> None:
        assert tracking_uri, "tests name the store"
        self.store = STORES[tracking_uri]

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.store.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found, name=name, lifecycle_stage="active")

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        if name in self.store.experiments:
            raise MlflowException(f"{name} exists")
        return self.store.experiments.setdefault(name, str(len(self.store.experiments) + 1))

    def search_runs(self, experiments: list[str], filter_string: str = "") -> list[Any]:
        [(key, value)] = re.findall(r"tags\.`(.+)` = '(.+)'", filter_string)
        runs = self.store.runs.items()
        return [self.get_run(i) for i, run in runs if run.experiment in experiments and run.tags.get(key) == value]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.store.runs[identity := f"{len(self.store.runs):032x}"] = FakeRun(experiment, run_name, dict(tags))
        return self.get_run(identity)

    def get_run(self, run_id: str) -> Any:
        run = self.store.runs[run_id]
        newest: dict[str, float] = {m.key: m.value for m in sorted(run.metrics, key=lambda m: (m.step, m.timestamp))}
        info = SimpleNamespace(
            run_id=run_id, run_name=run.name, status=run.status, end_time=run.end_time, experiment_id=run.experiment
        )
        return SimpleNamespace(info=info, data=SimpleNamespace(params=run.params, tags=run.tags, metrics=newest))

    def log_batch(self, run_id: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]) -> None:
        run = self.store.runs[run_id]
        if len(metrics) > 1000 or len(params) > 100 or len(tags) > 100:
            raise MlflowException("too many in one request")
        for name in (*(m.key for m in metrics), *(p.key for p in params), *(t.key for t in tags)):
            check_name(name)
        if any(run.params.get(p.key, p.value) != p.value or len(p.value) > 6000 for p in params):
            raise MlflowException("a parameter is changed or too long")
        run.metrics += metrics
        run.params |= dict(params)
        run.tags |= dict(tags)

    def get_metric_history(self, run_id: str, key: str) -> list[Metric]:
        return [m for m in self.store.runs[run_id].metrics if m.key == key]

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self.store.runs[run_id].files.append(Path(local_path).name)

    def list_artifacts(self, run_id: str) -> list[Any]:
        return [SimpleNamespace(path=name) for name in dict.fromkeys(self.store.runs[run_id].files)]

    def update_run(self, run_id: str, status: str) -> None:
        self.store.runs[run_id].status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.update_run(run_id, status)
        self.store.runs[run_id].end_time = time.time_ns()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts it in the place of the package."""
    STORES.clear()
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    for cls in (Metric, Param, RunTag):
        setattr(entities, cls.__name__, cls)
    module.entities, module.MlflowClient, module.MlflowException = entities, MlflowClient, MlflowException  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
