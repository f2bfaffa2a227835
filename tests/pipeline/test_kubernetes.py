"""Kubernetes' submit, status and stop against an API server of our own."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_kubernetes import DROPPED, PODS, FakeServer, fake_server, write_kubeconfig
from k8s_manifests import NAMES, ROOT, cluster, workload
from kubernetes.config import kube_config

from features.errors import UserError
from pipeline.cluster import kubernetes, kubernetes_api
from pipeline.cluster.base import Status
from pipeline.cluster.kubernetes_manifests import kinds

SERVICES = "/api/v1/namespaces/ml/services"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies"
JOBS = "/apis/batch/v1/namespaces/ml"
SETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/ml/jobsets"
K8S = cluster(allow_tag=True)


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
    monkeypatch.setattr(kubernetes, "POLL_S", 0)
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
    monkeypatch.setattr(kubernetes, "POLL_S", 0)
    monkeypatch.setattr(kubernetes, "POD_END_S", 0)
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
    with pytest.raises(UserError, match=r"timeout.*Job taskfuse-train is there all the same: it runs, or delete it"):
        K8S.submit(workload())
    assert [verb for verb, _ in requests(server)] == ["GET", *["POST"] * 4, "GET", "GET"]


@pytest.mark.parametrize("job", NAMES)
def test_a_workload_that_does_not_exist_is_one_line(job: str, server: FakeServer) -> None:
    with pytest.raises(
        UserError, match=f"taskfuse-{job} in namespace ml: the cluster refuses: taskfuse-{job} not found"
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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited, which takes no time."""
    found: list[float] = []
    monkeypatch.setattr(kubernetes_api.time, "sleep", found.append)
    return found


def running(server: FakeServer) -> str:
    path = f"{JOBS}/jobs/taskfuse-train"
    server.found[path] = {"kind": "Job", "status": {"active": 1, "ready": 1}}
    return path


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([(429, {"Retry-After": "7"})], [7]),
        ([(429, {"Retry-After": "3600"})], [kubernetes_api.LONGEST_WAIT_S]),
        ([(429, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})], [1]),
        ([(500, {}), (503, {}), (504, {})], [1, 2, 4]),
        ([DROPPED, (502, {})], [1, 2]),
    ],
)
def test_reading_is_tried_again_where_the_server_is_at_fault(
    failures: list[Any], expected: list[float], server: FakeServer, waits: list[float]
) -> None:
    server.failures["GET", running(server)] = failures
    assert K8S.status(workload(), "ml/taskfuse-train").state == "running"
    assert waits == expected


@pytest.mark.parametrize(
    ("failure", "times", "said"),
    [
        ((401, {}), 1, "failure 401. Log in again"),
        ((403, {}), 1, "failure 403. k8s/PODS.md lists"),
        ((410, {}), 1, "failure 410"),
        ((429, {}), 4, "failure 429. The cluster is busy"),
        ((500, {}), 4, "failure 500. Try again later"),
        (DROPPED, 4, "does not answer"),
    ],
)
def test_an_error_that_stays_is_one_line(
    failure: Any, times: int, said: str, server: FakeServer, waits: list[float]
) -> None:
    path = running(server)
    server.failures["GET", path] = [failure] * 9
    with pytest.raises(UserError, match=said) as caught:
        K8S.status(workload(), "ml/taskfuse-train")
    assert "\n" not in str(caught.value)
    assert len(server.seen) == times


def test_a_cluster_that_takes_too_long_is_one_line(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_api, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(server.RequestHandlerClass, "content", lambda *_: kubernetes_api.time.sleep(1))
    with pytest.raises(UserError, match=r"does not answer .*timed out"):
        K8S.status(workload(), "ml/taskfuse-train")


@pytest.mark.parametrize(("failure", "creations"), [((429, {"Retry-After": "1"}), 2), ((500, {}), 1), (DROPPED, 1)])
def test_a_job_is_created_once_whatever_becomes_of_the_answer(
    failure: Any, creations: int, server: FakeServer, waits: list[float]
) -> None:
    server.failures["POST", f"{JOBS}/jobs"] = [failure]
    if creations == 1:
        with pytest.raises(UserError, match=r"failure 500|does not answer"):
            K8S.submit(workload())
        assert {path for verb, path in requests(server) if verb == "DELETE"} >= {"networkpolicies/taskfuse-train"}
    else:
        K8S.submit(workload())
    assert requests(server).count(("POST", "ml/jobs")) == creations


def test_deleting_is_tried_again(server: FakeServer, waits: list[float]) -> None:
    server.failures["DELETE", f"{JOBS}/jobs/taskfuse-train"] = [(503, {}), DROPPED, (429, {})]
    K8S.stop(workload(), "ml/taskfuse-train")
    assert requests(server).count(("DELETE", "jobs/taskfuse-train")) == 4


VERBS = {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete"}


def access(verb: str, path: str) -> tuple[str, str, str]:
    """API group, resource and verb of a request, as a role names them."""
    place, _, query = path.partition("?")
    parts = place.strip("/").split("/")
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
    _, _, resource, *name = rest
    if verb == "GET" and not name:
        return group, resource, "watch" if "watch=" in query else "list"
    return group, "/".join([resource, *name[1:]]), VERBS[verb]


def test_the_role_of_the_run_book_allows_what_the_backend_asks_for_and_nothing_else(
    tmp_path: Path, server: FakeServer, waits: list[float]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("a: 1\n")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "k8s" / "RUNBOOK.md").read_text(), re.M | re.S)
    rules = yaml.safe_load(text)["rules"]
    allowed = {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    one: dict[str, Any] = {"config_dir": tmp_path, "nodes": 2}
    for form, given in [
        *((form, one) for form in ("job", "jobset", "trainjob")),
        ("job", {"job": "nightly"}), ("job", {"job": "evaluate", "service": True}),
    ]:  # fmt: skip
        k8s, work = cluster(allow_tag=True, form=form), workload(**given)
        name = work.name
        server.lost.clear()
        k8s.submit(work)
        objects = [(path, body) for verb, path, body in server.seen if verb == "POST"][-len(kinds(k8s, work)) :]
        for path, body in objects:
            server.found[f"{path}/{name}"] = body | {"metadata": body["metadata"] | {"resourceVersion": "1"}}
        last = objects[-1][0]
        server.found[f"{last}/{name}"] |= {"status": {"conditions": [condition("Complete")]}}
        with suppress(ValueError):
            k8s.status(work, f"ml/{name}")
        del server.found[f"{last}/{name}"]
        server.refuse = {body["kind"]: (409, "exists") for _, body in objects[:-1]}
        k8s.submit(work)  # over what an earlier one left
        server.refuse = {}
        k8s.stop(work, f"ml/{name}")
    server.found[f"{JOBS}/jobs/taskfuse-train"] = [
        {"kind": "Job", "status": {"ready": 1}},
        {"kind": "Job", "status": {"conditions": [condition("Complete")]}},
    ]
    server.found[PODS] = {"kind": "PodList", "items": [pod("a", phase="Succeeded")]}
    server.found[f"{PODS}/a"] = pod("a", phase="Succeeded")
    list(K8S.logs(workload(), "ml/taskfuse-train", None, follow=True))
    assert {access(verb, path) for verb, path, _ in server.seen} == allowed
