"""pipeline/cluster: what every registered backend does, and Kubernetes' status, logs and stop against an API server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fake_kubernetes import FakeServer, fake_server, write_kubeconfig
from kubernetes.config import kube_config

from features.errors import UserError
from pipeline.cluster import kubernetes
from pipeline.cluster.base import Job, Workload
from pipeline.cluster.registry import BACKENDS

ROOT = Path(__file__).parents[2]
DEFAULTS = yaml.safe_load((ROOT / "jobs" / "conf" / "submit.yaml").read_text())
PODS = "/api/v1/namespaces/ml/pods"
SERVICES = "/api/v1/namespaces/ml/services"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies"
JOBS = "/apis/batch/v1/namespaces/ml"
ARGS = ["data=demo", "against=a b"]


def workload(job: Job, **values: Any) -> Workload:
    known = {key: value for key, value in DEFAULTS.items() if key in Workload.model_fields} | {"allow_tag": True}
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
    items = [{"metadata": {"name": name}, "status": {"phase": phase}} for name, phase in phases.items()]
    server.found[PODS] = {"kind": "PodList", "items": items}
    server.found[f"{PODS}/run-7-0-y/log"] = "step 1\nerror: Zürich's disk is full\n"
    server.found[f"{PODS}/run-7-1-x/log"] = "step 1\n"
    lines = list(BACKENDS["k8s"].logs(workload("train", name="run-7")))
    assert lines == ["run-7-0-y: step 1", "run-7-0-y: error: Zürich's disk is full", "run-7-1-x: step 1"]
    assert server.seen[0][1].endswith("labelSelector=app.kubernetes.io/instance=run-7")


def requests(server: FakeServer) -> list[tuple[str, str]]:
    """Verb and the end of the path of each request so far."""
    return [(verb, "/".join(path.partition("?")[0].split("/")[-2:])) for verb, path, _ in server.seen]


def test_stop_deletes_what_submit_created_and_the_pods_with_it(server: FakeServer) -> None:
    k8s = BACKENDS["k8s"]
    for job in get_args(Job):
        k8s.submit(workload(job))
        created = [f"{path}/taskfuse-{job}" for verb, path, _ in server.seen if verb == "POST"]
        assert created[0] == f"/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies/taskfuse-{job}"
        server.seen.clear()
        k8s.stop(workload(job))
        deleted = [path for verb, path, _ in server.seen if verb == "DELETE"]
        assert [path.partition("?")[0] for path in deleted] == created[::-1], "pods meet through the Service"
        assert all(path.endswith("?propagationPolicy=Background") for path in deleted), "or pods would stay"
        server.seen.clear()


def pods(*names: str) -> dict[str, Any]:
    return {"kind": "PodList", "items": [{"metadata": {"name": name}} for name in names]}


def test_the_policy_stays_until_the_last_pod_has_ended(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "POLL_S", 0)
    server.found[PODS] = [pods("a", "b"), pods("a"), pods()]
    BACKENDS["k8s"].stop(workload("train"))
    assert requests(server) == [
        ("DELETE", "jobs/taskfuse-train"),
        ("DELETE", "services/taskfuse-train"),
        *[("GET", "ml/pods")] * 3,
        ("DELETE", "networkpolicies/taskfuse-train"),
    ]


def test_the_policy_stays_where_pods_do_not_end(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "POLL_S", 0)
    monkeypatch.setattr(kubernetes, "POD_END_S", 0)
    server.found[PODS] = pods("a")
    with pytest.raises(UserError, match="1 pods of taskfuse-train in namespace ml have not ended; their NetworkPolicy"):
        BACKENDS["k8s"].stop(workload("train", grace_s=0))
    assert "networkpolicies/taskfuse-train" not in dict(map(reversed, requests(server)))


def test_stop_clears_up_after_a_job_that_was_deleted(server: FakeServer) -> None:
    server.gone.add(f"{JOBS}/jobs/taskfuse-train")
    BACKENDS["k8s"].stop(workload("train"))
    assert requests(server)[-1] == ("DELETE", "networkpolicies/taskfuse-train")
    server.gone |= {f"{SERVICES}/taskfuse-train", f"{POLICIES}/taskfuse-train"}
    with pytest.raises(
        UserError, match="Job taskfuse-train in namespace ml: the cluster refuses: taskfuse-train not found"
    ):
        BACKENDS["k8s"].stop(workload("train"))


def left(kind: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    """What the server has of a kind: ours, or with these labels."""
    (ours,) = [d for d in yaml.safe_load_all(BACKENDS["k8s"].render(workload("train"))) if d["kind"] == kind]
    return ours | {"metadata": ours["metadata"] | ({"labels": labels} if labels is not None else {})}


def test_what_a_job_that_was_deleted_left_behind_is_replaced(server: FakeServer) -> None:
    server.refuse = {"NetworkPolicy": (409, "already exists"), "Service": (409, "already exists")}
    server.found[f"{POLICIES}/taskfuse-train"], server.found[f"{SERVICES}/taskfuse-train"] = (
        left("NetworkPolicy"),
        left("Service"),
    )
    BACKENDS["k8s"].submit(workload("train", egress=["10.0.0.0/8"]))
    assert requests(server) == [
        ("GET", "jobs/taskfuse-train"),
        ("POST", "ml/networkpolicies"),
        ("GET", "networkpolicies/taskfuse-train"),
        ("PUT", "networkpolicies/taskfuse-train"),
        ("POST", "ml/services"),
        ("GET", "services/taskfuse-train"),
        ("PUT", "services/taskfuse-train"),
        ("POST", "ml/jobs"),
    ]
    (put, *_) = [body for verb, _, body in server.seen if verb == "PUT"]
    assert "10.0.0.0/8" in str(put)


@pytest.mark.parametrize("labels", [{}, {"app.kubernetes.io/instance": "taskfuse-train"}])
def test_an_object_of_someone_else_is_not_replaced(labels: dict[str, str], server: FakeServer) -> None:
    server.refuse = {"Service": (409, "services taskfuse-train already exists")}
    server.found[f"{SERVICES}/taskfuse-train"] = left("Service", labels)
    with pytest.raises(UserError, match="services taskfuse-train already exists"):
        BACKENDS["k8s"].submit(workload("train"))
    assert "PUT" not in dict(requests(server))
    assert [path for verb, path in requests(server) if verb == "DELETE"] == ["networkpolicies/taskfuse-train"]


def test_a_job_that_is_there_is_refused_before_anything_is_created(server: FakeServer) -> None:
    server.found[f"{JOBS}/jobs/taskfuse-train"] = {"kind": "Job"}
    said = "Job taskfuse-train in namespace ml exists.*: kubectl delete -n ml networkpolicy,service,job taskfuse-train"
    with pytest.raises(UserError, match=said):
        BACKENDS["k8s"].submit(workload("train"))
    assert requests(server) == [("GET", "jobs/taskfuse-train")]


def test_a_job_that_was_created_without_an_answer_keeps_its_policy(server: FakeServer) -> None:
    server.lost.add("Job")
    with pytest.raises(UserError, match="timeout"):
        BACKENDS["k8s"].submit(workload("train"))
    assert [verb for verb, _ in requests(server)] == ["GET", "POST", "POST", "POST", "GET"]


@pytest.mark.parametrize("job", get_args(Job))
def test_a_workload_that_does_not_exist_is_one_line(job: Job, server: FakeServer) -> None:
    with pytest.raises(UserError, match=f"taskfuse-{job} in namespace ml: the cluster refuses: status not found"):
        BACKENDS["k8s"].status(workload(job))
