"""pipeline/cluster: what every registered backend does, and Kubernetes' status, logs and stop against an API server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fake_kubernetes import FakeServer, fake_server, write_kubeconfig
from kubernetes.config import kube_config

from features.errors import UserError
from pipeline.cluster.base import Job, Workload
from pipeline.cluster.registry import BACKENDS

ROOT = Path(__file__).parents[2]
DEFAULTS = yaml.safe_load((ROOT / "jobs" / "conf" / "submit.yaml").read_text())
JOBS = "/apis/batch/v1/namespaces/ml"
ARGS = ["data=demo", "against=a b"]


def workload(job: Job, **values: Any) -> Workload:
    known = {key: value for key, value in DEFAULTS.items() if key in Workload.model_fields}
    return Workload.model_validate(known | {"job": job, "name": f"taskfuse-{job}"} | values)


@pytest.mark.parametrize("job", get_args(Job))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_names_the_job_all_its_arguments_and_its_ranks(backend: str, job: Job) -> None:
    text = BACKENDS[backend].render(workload(job, args=ARGS, ranks_per_node=3 if job == "train" else 1))
    assert f"jobs.{job}" in text
    assert [arg for arg in ARGS if arg not in text] == []
    assert ("--nproc-per-node=3" in text) == (job == "train")
    assert text.endswith("\n")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_needs_no_cluster_and_is_the_same_twice(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", "none")
    work = workload("train")
    assert BACKENDS[backend].render(work) == BACKENDS[backend].render(work)


def test_a_local_job_is_followed_where_it_runs() -> None:
    local, work = BACKENDS["local"], workload("train")
    for call in (local.status, local.logs, local.stop):
        with pytest.raises(UserError, match="runs train in the foreground"):
            call(work)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with fake_server() as fake:
        config = write_kubeconfig(tmp_path, fake.server_port)
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))  # read from KUBECONFIG on import
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield fake


def condition(kind: str, status: str = "True", message: str | None = None) -> dict[str, Any]:
    return {"type": kind, "status": status, "message": message}


@pytest.mark.parametrize(
    ("status", "state", "detail"),
    [
        ({}, "pending", "0 ready of 0 active"),
        ({"active": 2}, "pending", "0 ready of 2 active"),
        ({"active": 2, "ready": 1, "failed": 3}, "running", "1 ready of 2 active, 0 succeeded, 3 failed"),
        ({"conditions": [condition("Suspended")]}, "suspended", "Suspended"),
        ({"active": 1, "ready": 1, "conditions": [condition("Suspended", "False")]}, "running", "1 ready of 1 active"),
        ({"succeeded": 2, "conditions": [condition("Complete")]}, "succeeded", "Complete"),
        ({"conditions": [condition("Failed", message="backoff limit")]}, "failed", "backoff limit"),
    ],
)
def test_the_state_of_a_job_follows_from_its_conditions_then_its_pods(
    status: dict[str, Any], state: str, detail: str, server: FakeServer
) -> None:
    server.found[f"{JOBS}/jobs/taskfuse-train/status"] = {"kind": "Job", "status": status}
    found = BACKENDS["k8s"].status(workload("train"))
    assert found.state == state
    assert detail in found.detail


@pytest.mark.parametrize(
    ("suspend", "active", "state"),
    [(False, [], "pending"), (False, [{"name": "n-1"}], "running"), (True, [], "suspended")],
)
def test_nightly_is_pending_between_two_nights(
    suspend: bool, active: list[Any], state: str, server: FakeServer
) -> None:
    spec = {"schedule": "0 3 * * *", "suspend": suspend, "jobTemplate": {}}
    cron = {"kind": "CronJob", "spec": spec, "status": {"active": active, "lastScheduleTime": "2026-11-09T03:00:00Z"}}
    server.found[f"{JOBS}/cronjobs/taskfuse-nightly/status"] = cron
    found = BACKENDS["k8s"].status(workload("nightly"))
    assert found == (state, "schedule 0 3 * * * UTC, last started 2026-11-09 03:00:00+00:00")


def test_logs_are_those_of_the_workload_by_pod_without_the_ones_that_have_not_started(server: FakeServer) -> None:
    phases = {"run-7-1-x": "Running", "run-7-0-y": "Failed", "run-7-2-z": "Pending"}
    pods = "/api/v1/namespaces/ml/pods"
    items = [{"metadata": {"name": name}, "status": {"phase": phase}} for name, phase in phases.items()]
    server.found[pods] = {"kind": "PodList", "items": items}
    server.found[f"{pods}/run-7-0-y/log"] = "step 1\nerror: Zürich's disk is full\n"
    server.found[f"{pods}/run-7-1-x/log"] = "step 1\n"
    lines = list(BACKENDS["k8s"].logs(workload("train", name="run-7")))
    assert lines == ["run-7-0-y: step 1", "run-7-0-y: error: Zürich's disk is full", "run-7-1-x: step 1"]
    assert server.seen[0][1].endswith("labelSelector=app.kubernetes.io/instance=run-7")


def test_stop_deletes_what_submit_created_and_the_pods_with_it(server: FakeServer) -> None:
    k8s = BACKENDS["k8s"]
    for job in get_args(Job):
        k8s.submit(workload(job))
        created = [f"{path}/taskfuse-{job}" for _, path, _ in server.seen]
        server.seen.clear()
        k8s.stop(workload(job))
        assert [verb for verb, _, _ in server.seen] == ["DELETE"] * len(created)
        assert [path.partition("?")[0] for _, path, _ in server.seen] == created[::-1], "pods meet through the Service"
        assert all(path.endswith("?propagationPolicy=Background") for _, path, _ in server.seen), "or pods would stay"
        server.seen.clear()


@pytest.mark.parametrize("job", get_args(Job))
def test_a_workload_that_does_not_exist_is_one_line(job: Job, server: FakeServer) -> None:
    with pytest.raises(UserError, match=f"taskfuse-{job} in namespace ml: the cluster refuses: status not found"):
        BACKENDS["k8s"].status(workload(job))
