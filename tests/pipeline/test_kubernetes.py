"""Kubernetes' submit, status and stop against an API server of our own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_kubernetes import PODS, FakeServer, current_cluster
from k8s_manifests import NAMES, cluster, workload

from features.errors import UserError
from pipeline.cluster.base import Status
from pipeline.cluster.kubernetes import backend

SERVICES = "/api/v1/namespaces/ml/services"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies"
JOBS = "/apis/batch/v1/namespaces/ml"
SETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/ml/jobsets"
K8S = cluster(allow_tag=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with current_cluster(tmp_path, monkeypatch) as fake:
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
    server.found[f"{JOBS}/jobs/taskfuse-train"] = {"kind": "Job", "status": status}
    found = K8S.status(workload(), "ml/taskfuse-train")
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
    server.found[f"{JOBS}/cronjobs/taskfuse-nightly"] = cron
    found = K8S.status(workload(job="nightly"), "ml/taskfuse-nightly")
    assert found[:2] == (state, "schedule 0 3 * * * UTC, last started 2026-11-09 03:00:00+00:00")


def requests(server: FakeServer) -> list[tuple[str, str]]:
    """Verb and the end of the path of each request so far."""
    return [(verb, "/".join(path.partition("?")[0].split("/")[-2:])) for verb, path, _ in server.seen]


def test_stop_deletes_what_submit_created_and_the_pods_with_it(server: FakeServer) -> None:
    for job in NAMES:
        assert K8S.submit(workload(job=job)) == f"ml/taskfuse-{job}"
        created = [f"{path}/taskfuse-{job}" for verb, path, _ in server.seen if verb == "POST"]
        assert created[0] == f"/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies/taskfuse-{job}"
        server.seen.clear()
        K8S.stop(workload(job=job), f"ml/taskfuse-{job}")
        deleted = [path for verb, path, _ in server.seen if verb == "DELETE"]
        left = ["networkpolicies", "serviceaccounts", "configmaps"]  # which pods have until they end
        kept = [path for path in created if path.split("/")[-2] in left]
        at_once = [path for path in created if path not in kept]
        assert [path.partition("?")[0] for path in deleted] == at_once[::-1] + kept[::-1], (
            "pods meet through the Service"
        )
        assert all(path.endswith("?propagationPolicy=Background") for path in deleted), "or pods would stay"
        server.seen.clear()


def pods(*names: str) -> dict[str, Any]:
    return {"kind": "PodList", "items": [{"metadata": {"name": name}} for name in names]}


def test_the_policy_stays_until_the_last_pod_has_ended(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "POLL_S", 0)
    server.found[PODS] = [pods("a", "b"), pods("a"), pods()]
    K8S.stop(workload(), "ml/taskfuse-train")
    assert requests(server) == [
        ("DELETE", "jobs/taskfuse-train"),
        ("DELETE", "services/taskfuse-train"),
        *[("GET", "ml/pods")] * 3,
        ("DELETE", "serviceaccounts/taskfuse-train"),
        ("DELETE", "networkpolicies/taskfuse-train"),
    ]


def test_the_policy_stays_where_pods_do_not_end(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "POLL_S", 0)
    monkeypatch.setattr(backend, "POD_END_S", 0)
    server.found[PODS] = pods("a")
    with pytest.raises(UserError, match="1 pods of taskfuse-train in namespace ml have not ended; their NetworkPolicy"):
        K8S.stop(workload(grace_s=0), "ml/taskfuse-train")
    assert "networkpolicies/taskfuse-train" not in dict(map(reversed, requests(server)))


def test_stop_clears_up_after_a_job_that_was_deleted(server: FakeServer) -> None:
    server.gone.add(f"{JOBS}/jobs/taskfuse-train")
    K8S.stop(workload(), "ml/taskfuse-train")
    assert requests(server)[-1] == ("DELETE", "networkpolicies/taskfuse-train")
    accounts = "/api/v1/namespaces/ml/serviceaccounts"
    server.gone |= {f"{SERVICES}/taskfuse-train", f"{POLICIES}/taskfuse-train", f"{accounts}/taskfuse-train"}
    with pytest.raises(
        UserError, match="Job taskfuse-train in namespace ml: the cluster refuses: taskfuse-train not found"
    ):
        K8S.stop(workload(), "ml/taskfuse-train")


def left(kind: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    """What the server has of a kind: ours, or with these labels."""
    (ours,) = [d for d in yaml.safe_load_all(K8S.render(workload())) if d["kind"] == kind]
    return ours | {"metadata": ours["metadata"] | ({"labels": labels} if labels is not None else {})}


def test_what_a_job_that_was_deleted_left_behind_is_replaced(server: FakeServer) -> None:
    server.refuse = {"NetworkPolicy": (409, "already exists"), "Service": (409, "already exists")}
    server.found[f"{POLICIES}/taskfuse-train"], server.found[f"{SERVICES}/taskfuse-train"] = (
        left("NetworkPolicy"),
        left("Service"),
    )
    cluster(allow_tag=True, egress=["10.0.0.0/8"]).submit(workload())
    assert requests(server) == [
        ("GET", "jobs/taskfuse-train"),
        ("POST", "ml/networkpolicies"),
        ("GET", "networkpolicies/taskfuse-train"),
        ("PUT", "networkpolicies/taskfuse-train"),
        ("POST", "ml/serviceaccounts"),
        ("POST", "ml/services"),
        ("GET", "services/taskfuse-train"),
        ("PUT", "services/taskfuse-train"),
        ("POST", "ml/jobs"),
    ]
    (put, *_) = [body for verb, _, body in server.seen if verb == "PUT"]
    assert "10.0.0.0/8" in str(put)


def test_a_budget_that_was_left_behind_is_replaced_by_its_version(server: FakeServer) -> None:
    work, budgets = workload(nodes=2), "/apis/policy/v1/namespaces/ml/poddisruptionbudgets"
    (ours,) = [d for d in yaml.safe_load_all(K8S.render(work)) if d["kind"] == "PodDisruptionBudget"]
    server.refuse = {"PodDisruptionBudget": (409, "already exists")}
    server.found[f"{budgets}/taskfuse-train"] = ours | {"metadata": ours["metadata"] | {"resourceVersion": "7"}}
    K8S.submit(work)
    assert [body["metadata"]["resourceVersion"] for verb, _, body in server.seen if verb == "PUT"] == ["7"]


@pytest.mark.parametrize(("owner", "deleted"), [("taskfuse-train", True), ("another", False)])
def test_what_was_created_without_an_answer_is_deleted_again(owner: str, deleted: bool, server: FakeServer) -> None:
    server.failures["POST", SERVICES] = [(504, {})]
    ours = left("Service")["metadata"]["labels"]
    server.found[f"{SERVICES}/taskfuse-train"] = left("Service", ours | {"app.kubernetes.io/instance": owner})
    with pytest.raises(UserError, match="failure 504"):
        K8S.submit(workload())
    gone = [path for verb, path in requests(server) if verb == "DELETE"]
    assert gone == ["services/taskfuse-train"] * deleted + [
        "serviceaccounts/taskfuse-train",
        "networkpolicies/taskfuse-train",
    ]


def test_a_submission_that_is_interrupted_leaves_nothing(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    work = workload(job="explain", array=[["a=1"], ["a=2"]])
    create = backend.Connection.create
    counted = iter(range(9))
    monkeypatch.setattr(
        backend.Connection, "create", lambda *args: (interrupted if next(counted) == 4 else create)(*args)
    )
    with pytest.raises(KeyboardInterrupt):
        K8S.submit(work)
    made = [path for verb, path in requests(server) if verb == "POST"]
    assert len([path for verb, path in requests(server) if verb == "DELETE"]) == len(made) == 4


def test_the_secret_of_the_registry_is_the_pod_s(server: FakeServer) -> None:
    cluster(allow_tag=True, pull_secret="registry").submit(workload())
    pod = server.seen[-1][2]["spec"]["template"]["spec"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]


def test_a_record_keeps_the_context_of_its_submission(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert K8S.pinned() == {"context": "here"}
    assert cluster(context="away").pinned() == {"context": "away"}
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere")
    assert K8S.pinned() == {"context": None}


@pytest.mark.parametrize("labels", [{}, {"app.kubernetes.io/instance": "taskfuse-train"}])
def test_an_object_of_someone_else_is_not_replaced(labels: dict[str, str], server: FakeServer) -> None:
    server.refuse = {"Service": (409, "services taskfuse-train already exists")}
    server.found[f"{SERVICES}/taskfuse-train"] = left("Service", labels)
    with pytest.raises(UserError, match="services taskfuse-train already exists"):
        K8S.submit(workload())
    assert "PUT" not in dict(requests(server))
    assert [path for verb, path in requests(server) if verb == "DELETE"] == [
        "serviceaccounts/taskfuse-train",
        "networkpolicies/taskfuse-train",
    ]


def test_a_job_that_is_there_is_refused_before_anything_is_created(server: FakeServer) -> None:
    server.found[f"{JOBS}/jobs/taskfuse-train"] = {"kind": "Job"}
    kinds = "networkpolicy,serviceaccount,service,job"
    said = f"Job taskfuse-train in namespace ml exists.*: kubectl delete -n ml {kinds} taskfuse-train"
    with pytest.raises(UserError, match=said):
        K8S.submit(workload())
    assert requests(server) == [("GET", "jobs/taskfuse-train")]


def test_a_job_that_was_created_without_an_answer_keeps_its_policy(server: FakeServer) -> None:
    server.lost.add("Job")
    with pytest.raises(
        UserError, match=r"timeout.*Job taskfuse-train is there all the same: jobs.submit follows and stops it"
    ):
        K8S.submit(workload())
    assert [verb for verb, _ in requests(server)] == ["GET", *["POST"] * 4, "GET", "GET"]


def test_a_job_that_someone_else_creates_meanwhile_is_not_said_to_run_for_us(server: FakeServer) -> None:
    ours = {"kind": "Job"}
    server.found[f"{JOBS}/jobs/taskfuse-train"] = [None, ours]
    server.refuse = {"Job": (409, "jobs taskfuse-train already exists")}
    with pytest.raises(UserError, match="already exists") as caught:
        K8S.submit(workload())
    assert "it runs" not in str(caught.value)
    assert "DELETE" not in dict(requests(server)), "its pods have the same policy"


@pytest.mark.parametrize("job", NAMES)
def test_a_workload_that_does_not_exist_is_one_line(job: str, server: FakeServer) -> None:
    with pytest.raises(
        UserError, match=rf"taskfuse-{job} is not in namespace ml: stopped, or deleted \d+ s after its end"
    ):
        K8S.status(workload(job=job), f"ml/taskfuse-{job}")


def test_a_cluster_is_the_context_that_it_names(server: FakeServer) -> None:
    with pytest.raises(UserError, match=r"the cluster at http://127.0.0.1:1 does not answer"):
        cluster(allow_tag=True, context="away").submit(workload())
    with pytest.raises(UserError, match=r"no usable kubeconfig .*nowhere"):
        cluster(allow_tag=True, context="nowhere").submit(workload())
    assert server.seen == []


def test_the_namespace_is_that_of_the_submission_whatever_the_cluster_says_by_now(server: FakeServer) -> None:
    assert cluster(allow_tag=True, namespace="other").submit(workload()) == "other/taskfuse-train"
    server.found[f"{JOBS}/jobs/taskfuse-train"] = {"kind": "Job", "status": {"active": 1, "ready": 1}}
    assert cluster(namespace="other").status(workload(), "ml/taskfuse-train").state == "running"


def test_a_team_s_configuration_is_a_config_map_that_the_pods_see_as_a_folder(
    tmp_path: Path, server: FakeServer
) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "mine.yaml").write_text("a: Zürich\n")
    (tmp_path / "data" / "deep" / "é.yaml").write_text("b: 2\n")
    (tmp_path / "cluster").mkdir()
    for name in ("cluster/own.yaml", ".hidden.yaml", "data/notes.txt"):
        (tmp_path / name).write_text("not: this\n")
    K8S.submit(workload(config_dir=tmp_path, words=["data=mine"]))
    bodies = {body["kind"]: body for verb, _, body in server.seen if verb == "POST"}
    pod = bodies["Job"]["spec"]["template"]["spec"]
    (volume,) = [v["configMap"] for v in pod["volumes"] if v["name"] == "config"]
    assert volume["name"] == bodies["ConfigMap"]["metadata"]["name"]
    seen = {item["path"]: bodies["ConfigMap"]["data"][item["key"]] for item in volume["items"]}
    assert seen == {"data/mine.yaml": "a: Zürich\n", "data/deep/é.yaml": "b: 2\n"}
    (container,) = pod["containers"]
    assert {"name": "config", "mountPath": "/config", "readOnly": True} in container["volumeMounts"]
    assert [*container["command"], *container["args"]][-2:] == ["--config-dir=/config", "data=mine"]


def test_a_configuration_that_no_config_map_holds_is_refused_before_anything_is_created(
    tmp_path: Path, server: FakeServer
) -> None:
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(UserError, match=r"more than 1,000 files or 1 MiB"):
        K8S.submit(workload(config_dir=tmp_path))
    (tmp_path / "large.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"large.yaml is not UTF-8"):
        K8S.submit(workload(config_dir=tmp_path))
    assert server.seen == []


ARRAY = [["date=2026-11-01"], ["date=2026-11-02"]]


def test_an_array_is_a_job_for_each_of_its_words_or_none(server: FakeServer) -> None:
    work = workload(job="preprocess", name="days", words=["out=/data"], array=ARRAY)
    K8S.submit(work)
    jobs = [body for verb, _, body in server.seen if verb == "POST" and body["kind"] == "Job"]
    args = {job["metadata"]["name"]: job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs}
    assert args == {"days-0": ["out=/data", "date=2026-11-01"], "days-1": ["out=/data", "date=2026-11-02"]}
    for number, status in enumerate([{"conditions": [condition("Complete")]}, {"active": 1, "ready": 1, "failed": 1}]):
        server.found[f"{JOBS}/jobs/days-{number}"] = {"kind": "Job", "status": status}
    assert K8S.status(work, "ml/days") == Status("running", "of 2: 1 running, 1 succeeded", 1)
    server.seen.clear()
    del server.found[f"{JOBS}/jobs/days-0"]
    with pytest.raises(UserError, match="Job days-1 in namespace ml exists"):
        K8S.submit(work)
    assert "POST" not in dict(requests(server))


def test_the_jobs_of_an_array_that_cannot_all_be_created_are_deleted_again(server: FakeServer) -> None:
    server.failures["POST", f"{JOBS}/jobs"] = [(201, {}), (403, {})]
    with pytest.raises(UserError, match=r"Job days-1 .*failure 403.*PODS.md"):
        K8S.submit(workload(job="preprocess", name="days", array=ARRAY))
    assert ("DELETE", "jobs/days-0") in requests(server)
    assert ("DELETE", "networkpolicies/days-0") in requests(server)
    assert ("DELETE", "networkpolicies/days-1") in requests(server)


def test_what_kubernetes_cannot_do_is_refused_before_it_is_asked(server: FakeServer) -> None:
    for given, said in [
        ({"after": ["ml/other"]}, "starts no Job after another"),
        ({"job": "evaluate", "service": True, "schedule": "0 * * * *"}, "a service is one pod"),
    ]:
        with pytest.raises(UserError, match=said):
            K8S.submit(workload(**given))
    with pytest.raises(UserError, match="form=jobset takes a fixed number of nodes"):
        cluster(allow_tag=True, form="jobset").submit(workload(nodes="1..2"))
    with pytest.raises(UserError, match="suspend=true: the queue q starts whatever is suspended in it"):
        cluster(allow_tag=True, queue="q").submit(workload(suspend=True))
    for form, length, given in (("job", 52, {"schedule": "0 * * * *"}), ("jobset", 48, {})):  # pods 10 and on
        K8S.model_copy(update={"form": form}).render(workload(name="n" * length, nodes=10, **given))
        with pytest.raises(UserError, match="too long by 1 characters: pods are named after it"):
            K8S.model_copy(update={"form": form}).render(workload(name="n" * length, nodes=11, **given))
    assert server.seen == []


def pod(name: str, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": status}


def test_a_status_says_why_pods_do_not_run(server: FakeServer) -> None:
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/8 nodes: no gpu"}
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    killed = {"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    server.found[PODS] = {"kind": "PodList", "items": [
        pod("a", conditions=[unplaced]), pod("b", conditions=[unplaced]),
        pod("c", containerStatuses=[waiting | CONTAINER]), pod("d", containerStatuses=[killed | CONTAINER]),
    ]}  # fmt: skip
    server.found[f"{JOBS}/jobs/taskfuse-train"] = {"kind": "Job", "status": {"active": 4}}
    detail = K8S.status(workload(), "ml/taskfuse-train").detail
    assert "a: Unschedulable: 0/8 nodes: no gpu; c: ImagePullBackOff: not found; d: OOMKilled, exit code 137" in detail


CONTAINER = {"name": "train", "image": "i", "imageID": "i", "ready": False, "restartCount": 2}


def test_a_job_in_a_queue_is_pending_and_one_that_a_person_suspended_is_not(server: FakeServer) -> None:
    server.found[f"{JOBS}/jobs/taskfuse-train"] = {"kind": "Job", "status": {"conditions": [condition("Suspended")]}}
    queued = cluster(queue="gpu")
    assert queued.status(workload(), "ml/a")[:2] == ("pending", "waits in the queue gpu")
    assert queued.status(workload(suspend=True), "ml/a").state == "suspended"


@pytest.mark.parametrize(("replicas", "ready", "state"), [(1, 1, "running"), (1, 0, "pending"), (0, 0, "suspended")])
def test_a_service_runs_while_its_pod_is_ready(replicas: int, ready: int, state: str, server: FakeServer) -> None:
    spec = {"replicas": replicas, "selector": {}, "template": {}}
    found = {"kind": "Deployment", "spec": spec, "status": {"readyReplicas": ready}}
    server.found["/apis/apps/v1/namespaces/ml/deployments/taskfuse-evaluate"] = found
    server.found[PODS] = {"kind": "PodList", "items": [pod("a", containerStatuses=[{"state": {}} | CONTAINER])]}
    status = K8S.status(workload(job="evaluate", service=True), "ml/taskfuse-evaluate")
    assert (status.state, status.restarts) == (state, 2)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, "pending"),
        ({"replicatedJobsStatus": [{"name": "node", "ready": 1}], "restarts": 2}, "running"),
        ({"conditions": [condition("Completed")]}, "succeeded"),
        ({"conditions": [condition("Failed", message="maxRestarts")]}, "failed"),
        ({"conditions": [condition("Suspended")]}, "suspended"),
    ],
)
def test_the_state_of_a_job_set_follows_from_its_conditions(
    status: dict[str, Any], expected: str, server: FakeServer
) -> None:
    server.found[f"{SETS}/taskfuse-train"] = {"kind": "JobSet", "status": status}
    found = cluster(form="jobset").status(workload(), "ml/taskfuse-train")
    assert (found.state, found.restarts) == (expected, status.get("restarts"))


@pytest.mark.parametrize("form", ["jobset", "trainjob"])
def test_a_job_set_or_a_train_job_is_created_and_deleted_whole(form: str, server: FakeServer) -> None:
    k8s = cluster(allow_tag=True, form=form)
    k8s.submit(workload(nodes=2))
    created = [path for verb, path, _ in server.seen if verb == "POST"]
    assert created[-1] == (SETS if form == "jobset" else "/apis/trainer.kubeflow.org/v1alpha1/namespaces/ml/trainjobs")
    k8s.stop(workload(nodes=2), "ml/taskfuse-train")
    deleted = [path.partition("?")[0] for verb, path, _ in server.seen if verb == "DELETE"]
    assert sorted(deleted) == sorted(f"{path}/taskfuse-train" for path in created)
    assert deleted[0] == f"{created[-1]}/taskfuse-train"
