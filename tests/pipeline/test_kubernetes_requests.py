"""Requests of the Kubernetes backend: which are repeated, which errors are one line, and what a role must allow."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from fake_kubernetes import DROPPED, PODS, FakeServer, current_cluster
from k8s_manifests import ROOT, cluster, workload

from features.errors import UserError
from pipeline.cluster.kubernetes import api
from pipeline.cluster.kubernetes.manifests import kinds

JOBS = "/apis/batch/v1/namespaces/ml"
K8S = cluster(allow_tag=True)
COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}]}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with current_cluster(tmp_path, monkeypatch) as fake:
        yield fake


def requests(server: FakeServer) -> list[tuple[str, str]]:
    """Verb and the end of the path of each request so far."""
    return [(verb, "/".join(path.partition("?")[0].split("/")[-2:])) for verb, path, _ in server.seen]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited, which takes no time."""
    found: list[float] = []
    monkeypatch.setattr(api, "time", SimpleNamespace(**{**vars(time), "sleep": found.append}))
    return found


def running(server: FakeServer) -> str:
    path = f"{JOBS}/jobs/taskfuse-train"
    server.found[path] = {"kind": "Job", "status": {"active": 1, "ready": 1}}
    return path


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([(429, {"Retry-After": "7"})], [7]),
        ([(429, {"Retry-After": "3600"})], [api.LONGEST_WAIT_S]),
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
    monkeypatch.setattr(api, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(server.RequestHandlerClass, "content", lambda *_: api.time.sleep(1))
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


ENDED = {"metadata": {"name": "a"}, "status": {"phase": "Succeeded"}}
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
        server.found[f"{last}/{name}"] |= {"status": COMPLETE}
        with suppress(ValueError):
            k8s.status(work, f"ml/{name}")
        del server.found[f"{last}/{name}"]
        server.refuse = {body["kind"]: (409, "exists") for _, body in objects[:-1]}
        k8s.submit(work)  # over what an earlier one left
        server.refuse = {}
        k8s.stop(work, f"ml/{name}")
    server.found[f"{JOBS}/jobs/taskfuse-train"] = [
        {"kind": "Job", "status": {"ready": 1}},
        {"kind": "Job", "status": COMPLETE},
    ]
    server.found[PODS] = {"kind": "PodList", "items": [ENDED]}
    server.found[f"{PODS}/a"] = ENDED
    list(K8S.logs(workload(), "ml/taskfuse-train", None, follow=True))
    assert {access(verb, path) for verb, path, _ in server.seen} == allowed
